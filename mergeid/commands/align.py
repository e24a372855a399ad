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
        str, typer.Argument(metavar="B", help=f"Model whose neurons are put in order: {o.MODEL}.", show_default=False)
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="A", rich_help_panel=INPUT, help="Model whose order is taken.", show_default=False
        ),
    ],
    as_json: o.Json = False,
) -> int:
    """Write B with its neurons permuted into A's order: the same function, ready for any merging tool.

    With --transport its neurons are carried onto A's instead, in A's shapes: a function close to B's, for merging only.
    """
    with working(as_json) as work:
        result = call(b, to, progress=work.progress)
        from mergeid.reporting.show_merge import print_merge

        work.finish(result, print_merge)
    return 0
