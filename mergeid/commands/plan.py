"""``mergeid plan``: what merging would do, and why; no weights are written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergeid.basics.processes import is_first
from mergeid.commands import arguments as o
from mergeid.commands.launch import together
from mergeid.commands.terminal import Call, command_of, merge_after
from mergeid.commands.work import check_outputs, to_text, working, write_report
from mergeid.io.publish import write_whole
from mergeid.request.options import HOW
from mergeid.verbs.barrier import barrier
from mergeid.verbs.plan import plan
from mergeid.verbs.predict import predict

if TYPE_CHECKING:
    from mergeid.results.plan import Plan


@command_of(plan)
def command(
    call: Call[Plan],
    a: o.A,
    b: o.B,
    output: Annotated[Path | None, o.written("Also write the plan as a JSON file.")] = None,
    plot: Annotated[Path | None, o.drawn("Draw the evidence space by space in order of depth")] = None,
    page: o.Page = None,
    force: o.Force = False,
    verbose: o.Verbose = False,
    as_json: o.Json = False,
    strict: Annotated[
        bool, typer.Option("--strict", rich_help_panel=HOW, help="Exit with 1 if the pair will not merge.")
    ] = False,
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate",
            rich_help_panel=HOW,
            help="Estimate the memory, disk space and time of a merge from the file headers alone; exit with 1 if it "
            "does not fit.",
        ),
    ] = False,
) -> int:
    """Decide for every space of neurons: merge directly, match first, or will not merge.

    Without --data only the weights are compared, which is weaker evidence. With --base, or with asymmetric layers
    (which store their fixed parts), the plan also says what structure identifies. No weights are written. Under
    `accelerate launch` the processes share out the examples and the spaces to match.
    """
    check_outputs((a, b, *call.reads), force, output=output, plot=plot, report=page)
    if estimate:
        return _estimate(a, b, call, as_json) if is_first() else 0
    with working(as_json) as work:
        with together(call):
            found = call(a, b, progress=work.progress)
        if not is_first():
            return 0
        result = found.to_json()
        if output is not None:
            write_whole(output, to_text(result) + "\n", "-o")
        if plot is not None:
            from mergeid.reporting.evidence_plot import plot_evidence

            plot_evidence(found, plot)
        if page is not None:
            write_report(page, found, (a, b))
        if as_json:
            work.emit(result)
        else:
            from mergeid.reporting.show_plan import print_plan

            work.close()
            print_plan(found, work.console, verbose=verbose)
            work.wrote([p for p in (output, plot, page) if p is not None])
            work.say(_next(found, call, a, b))
    return 1 if strict and found.verdict == "will not merge" else 0


def _next(plan: Plan, call: Call[Plan], a: str, b: str) -> str:
    """What to run after this plan: the merge, or what says more where there will be none."""
    if plan.verdict == "will not merge" and call.given("heads"):  # which predictions know nothing of
        also = () if call.given("data") else ("--data", "DATA")
        command = call.next(barrier, a, b, also=also)
        return f"Next, with labels of all classes, to see what a merge would lose: {command}"
    if plan.verdict == "will not merge":
        return f"Next, to see what a merge would lose: {call.next(predict, a, b)}"
    return f"Next: {merge_after(call, a, b)}"


def _estimate(a: str, b: str, call: Call[Plan], as_json: bool) -> int:
    """What merging them takes."""
    from mergeid.reporting.show_estimate import print_estimate
    from mergeid.verbs.estimate import estimate

    with working(as_json) as work:
        found = call.to(estimate)(a, b)
        if as_json:
            work.emit(found.to_json())
        else:
            print_estimate(found, work.console)
    return 0 if found.fits else 1
