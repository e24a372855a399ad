"""``mergeid align``: B with its neurons in A's order, the same function, for any tool to merge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mergeid.commands import arguments as o
from mergeid.commands.terminal import Call, command_of
from mergeid.commands.work import working
from mergeid.request.options import INPUT
from mergeid.verbs.align import align

if TYPE_CHECKING:
    from mergeid.results.merge import MergeResult


@command_of(align)
def command(
    call: Call[MergeResult],
    b: Annotated[
        str, typer.Argument(metavar="B", help=f"Model whose neurons are permuted: {o.MODEL}.", show_default=False)
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="A", rich_help_panel=INPUT, help="Model whose neuron order is used.", show_default=False
        ),
    ],
    as_json: o.Json = False,
) -> int:
    """Write B with its neurons permuted into A's order: the same function, which any tool can merge with A.

    With --transport B's neurons are mapped onto A's by optimal transport instead, in A's shapes. That function is only
    close to B's, and is meant for merging.
    """
    with working(as_json) as work:
        result = call(b, to, progress=work.progress)
        from mergeid.reporting.show_merge import print_merge

        work.finish(result, print_merge)
    return 0
