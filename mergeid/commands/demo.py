"""``mergeid demo``: the whole line on two small networks that it trains itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergeid.commands import options as o
from mergeid.commands.work import working


def command(
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="FOLDER", rich_help_panel=o.OUTPUT, help="Where everything is written."),
    ] = Path("mergeid-demo"),
    force: Annotated[
        bool, typer.Option("--force", rich_help_panel=o.OUTPUT, help="Train and write again, over an earlier demo.")
    ] = False,
    as_json: o.Json = False,
    seed: o.Seed = 0,
) -> int:
    """Train two small networks on handwritten digits, merge them directly and with mergeid, and compare.

    Needs no download: the digits come with scikit-learn. A second run reuses the two networks.
    """
    with working(as_json) as work:
        from mergeid.verbs.demo import run

        result = run(output, force=force, seed=seed, progress=work.progress)
        if as_json:
            work.emit(result.to_json())
        else:
            work.close()
            result.print(work.console)
    return 0
