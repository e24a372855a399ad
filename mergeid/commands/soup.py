"""``mergeid soup``: many fine-tunes of one model into one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mergeid.commands import arguments as o
from mergeid.commands.terminal import Call, command_of
from mergeid.commands.work import check_outputs, working
from mergeid.verbs.soup import soup

if TYPE_CHECKING:
    from mergeid.results.soup import SoupResult


@command_of(soup)
def command(
    call: Call[SoupResult],
    models: Annotated[
        list[str], typer.Argument(metavar="A B [C …]", help=f"Fine-tunes of one model: {o.MODEL}.", show_default=False)
    ],
    as_json: o.Json = False,
) -> int:
    """Average fine-tunes of one model: those that help on validation data, or all, or with learned coefficients.

    They are aligned with A first, where the plan says so. The output follows A, and mergeid.json beside it lists what
    went into it. A greedy soup looks a little better on the data that it was chosen on than it really is.
    """
    check_outputs((*models, *call.reads))
    with working(as_json) as work:
        result = call(models, progress=work.progress)
        from mergeid.reporting.soups import print_soup

        work.finish(result, print_soup)
    return 0
