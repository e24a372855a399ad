"""``mergeid sketch``: run a model once, and keep what comparing it with others needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergeid.commands import options as o
from mergeid.commands.work import working


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"{o.MODEL}.", show_default=False)],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="DATA",
            rich_help_panel=o.INPUT,
            show_default=False,
            help="Inputs that the model is run on; sketches compare only where they are the same.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FILE", rich_help_panel=o.OUTPUT, show_default=False, help="NAME.sketch."
        ),
    ],
    arch: o.Arch = None,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", min=2, rich_help_panel=o.INPUT, help="Most inputs taken from DATA.")
    ] = 256,
    allow_pickle: o.AllowPickle = False,
    force: o.Force = False,
    as_json: o.Json = False,
    seed: o.Seed = 0,
    device: o.Device = "cpu",
) -> int:
    """Keep what a model does on some inputs, so that `mergeid predict *.sketch` compares it without running it."""
    from mergeid.verbs import api

    with working(as_json) as work:
        made = api.sketch(
            model,
            data=data,
            output=output,
            arch=arch,
            limit=limit,
            seed=seed,
            device=device,
            allow_pickle=allow_pickle,
            force=force,
            progress=work.progress,
        )
        if as_json:
            rows = {s: list(v.shape) for s, v in made.activations.items()}
            work.emit({"output": output, "arch": made.arch, "inputs": made.inputs, "activations": rows})
        else:
            work.wrote([output])
    return 0
