"""``mergeid barrier``: loss and accuracy on the straight line from A to B, measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from mergeid.basics.processes import is_first
from mergeid.commands import arguments as o
from mergeid.commands.launch import together
from mergeid.commands.terminal import Call, command_of
from mergeid.commands.work import check_outputs, to_text, working, write_report
from mergeid.errors import MergeidError
from mergeid.io.publish import write_whole
from mergeid.verbs.barrier import barrier

if TYPE_CHECKING:
    from mergeid.results.barrier import BarrierResult


@command_of(barrier)
def command(
    call: Call[BarrierResult],
    a: o.A,
    b: o.B,
    output: Annotated[Path | None, o.written("Also write the curve as a JSON file.")] = None,
    plot: Annotated[Path | None, o.drawn("Draw the curve")] = None,
    page: o.Page = None,
    force: o.Force = False,
    as_json: o.Json = False,
) -> int:
    """Measure the loss barrier between A and B on labelled data, as is or matched.

    Under `accelerate launch` the processes share out the points and the examples; the first prints and writes.
    """
    if call.given("calibration") and not any(map(call.given, ("match", "repair", "solve"))):
        raise MergeidError("--calibration is read for --match, --repair and --solve; add one of them, or leave it out")
    check_outputs((a, b, *call.reads), force, output=output, plot=plot, report=page, resume=call.path("resume"))
    with working(as_json) as work:
        with together(call):
            result = call(a, b, progress=work.progress)
        if not is_first():
            return 0
        curves = [*result.beside, result]
        if output is not None:
            write_whole(output, to_text(result.to_json()) + "\n", "-o")
        if plot is not None:
            from mergeid.reporting.plots import plot_barriers

            plot_barriers(curves, plot)
        if page is not None:
            write_report(page, result, (a, b))
        if as_json:
            work.emit(result.to_json())
        else:
            from mergeid.reporting.tables import barrier_points, barrier_summary

            work.close()
            console = work.console
            console.print(barrier_points(curves, width=console.width))
            console.print()
            console.print(barrier_summary(curves, width=console.width))
            work.wrote([p for p in (output, plot, page) if p is not None])
    return 0
