"""``mergeid explain``: what a word in mergeid's tables and pages means."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from mergeid.commands import arguments as o
from mergeid.commands.terminal import offered
from mergeid.commands.work import working
from mergeid.reporting.terms import TERMS, explain


def command(
    term: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TERM",
            help="A word from a table, such as barrier, J or ι (iota).",
            show_default=False,
            autocompletion=offered(term.name for term in TERMS),
        ),
    ] = None,
    as_json: o.Json = False,
) -> int:
    """Explain a term in plain words, or list all terms."""
    found = [explain(" ".join(term))] if term else TERMS
    with working(as_json) as work:
        if as_json:
            work.emit([asdict(each) for each in found])
            return 0
        for each in found:
            work.console.print(f"{each.name}: {each.meaning}", markup=False)
    return 0
