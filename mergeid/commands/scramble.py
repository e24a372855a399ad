"""``mergeid scramble``: the same function, its neurons in a random order."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergeid.commands import options as o
from mergeid.commands.work import working


def command(
    a: Annotated[str, typer.Argument(metavar="A", help=f"Model to scramble: {o.MODEL}.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            rich_help_panel=o.OUTPUT,
            help="A .safetensors file or a folder.",
            show_default=False,
        ),
    ],
    arch: o.Arch = None,
    allow_pickle: o.AllowPickle = False,
    force: o.Force = False,
    as_json: o.Json = False,
    seed: o.Seed = 0,
) -> int:
    """Apply a random element of the symmetry group to A and write the result: a check for anybody to run.

    The output computes the same function with its neurons in another order.
    """
    from mergeid.verbs import api

    with working(as_json) as work:
        result = api.scramble(
            a, output=output, seed=seed, arch=arch, force=force, allow_pickle=allow_pickle, progress=work.progress
        )
        if as_json:
            work.emit(result.to_json())
            return 0
        work.close()
        work.say(
            f"{result.arch}: {100 * result.moved_share:.1f} % of the parameters lie in tensors that moved; "
            f"outputs equal to a relative error of {result.max_relative_error:.1e} (seed {result.seed})."
        )
        work.wrote(result.files)
    return 0
