"""``mergeid explain``: what a word in mergeid's tables and pages means."""

from __future__ import annotations

from typing import Annotated

import typer

from mergeid.commands.work import working


def command(
    term: Annotated[
        list[str] | None,
        typer.Argument(metavar="TERM", help="A word from a table, such as barrier, J or ι (iota).", show_default=False),
    ] = None,
) -> int:
    """Explain a term in plain words, or list all terms."""
    from mergeid.reporting.terms import TERMS, explain

    with working() as work:
        if term:
            found = explain(" ".join(term))
            work.say(f"{found.name}: {found.meaning}")
        else:
            for each in TERMS:
                work.console.print(f"{each.name}: {each.meaning}", markup=False)
    return 0
