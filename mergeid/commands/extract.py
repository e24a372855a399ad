"""``mergeid extract``: a full fine-tune minus its base, as an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergeid.commands import arguments as o
from mergeid.commands.terminal import Call, command_of
from mergeid.commands.work import working
from mergeid.request.options import INPUT
from mergeid.verbs.extract import extract

if TYPE_CHECKING:
    from mergeid.results.extract import ExtractResult


@command_of(extract)
def command(
    call: Call[ExtractResult],
    model: Annotated[str, o.model("The fine-tune: ")],
    base: Annotated[
        str,
        typer.Option(
            "--base",
            metavar="MODEL",
            rich_help_panel=INPUT,
            help="Model that it was fine-tuned from.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, o.written("Folder for the adapter.", "OUT")],
    as_json: o.Json = False,
) -> int:
    """Write what a fine-tune adds to its base as a PEFT adapter (LoRA) of a chosen rank.

    Each changed weight of a linear layer is approximated by the best pair of factors of that rank. Other changed
    tensors are stored in full. The result says how much of the change is lost.
    """
    with working(as_json) as work:
        result = call(model, base=base, output=output, progress=work.progress)
        if as_json:
            work.emit(result.to_json())
            return 0
        work.close()
        whole = f"; {len(result.whole)} other tensors are stored in full" if result.whole else ""
        work.say(
            f"{len(result.errors)} weights as factors of rank {result.rank}, which leave out "
            f"{result.left_out} of the change (relative Frobenius norm){whole}."
        )
        work.wrote(result.files)
    return 0
