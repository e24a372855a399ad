"""``mergeid similarity``: how alike the layers of two models are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from mergeid.commands import arguments as o
from mergeid.commands.terminal import Call, command_of
from mergeid.commands.work import check_outputs, to_text, working
from mergeid.io.publish import write_whole
from mergeid.verbs.similarity import similarity

if TYPE_CHECKING:
    from mergeid.results.similarity import SimilarityResult


@command_of(similarity)
def command(
    call: Call[SimilarityResult],
    a: o.A,
    b: o.B,
    output: o.JsonFile = None,
    plot: Annotated[Path | None, o.drawn("Draw CKA of all layers of A with all of B as a heat map")] = None,
    force: o.Force = False,
    as_json: o.Json = False,
) -> int:
    """Compare the layers of A and B on the same data: CKA (plain and unbiased), SVCCA and PWCCA."""
    check_outputs((a, b, *call.reads), force, output=output, plot=plot)
    with working(as_json) as work:
        result = call(a, b, progress=work.progress)
        if output is not None:
            write_whole(output, to_text(result.to_json()) + "\n", "-o")
        if plot is not None:
            from mergeid.reporting.plots import plot_heat_map

            plot_heat_map(
                result.names_a,
                result.names_b,
                result.cka_map,
                plot,
                label="unbiased CKA",
                axes=("layers of A", "layers of B"),
            )
        if as_json:
            work.emit(result.to_json())
        else:
            from mergeid.reporting.tables import similarity_table

            work.close()
            work.console.print(similarity_table(result, width=work.console.width))
            for note in result.notes:
                work.say(f"Note: {note}.")
            work.wrote([p for p in (output, plot) if p is not None])
    return 0
