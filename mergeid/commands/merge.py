"""``mergeid merge``: two checkpoints in, one out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergeid.commands import options as o
from mergeid.commands.work import working


def command(
    a: o.A,
    b: o.B,
    data: o.Data = None,
    arch: o.Arch = None,
    skip: o.Skip = None,
    limit: o.Limit = 512,
    allow_pickle: o.AllowPickle = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            rich_help_panel=o.OUTPUT,
            help="A .safetensors file or a folder; ./merged.safetensors if not given (./merged for a folder).",
        ),
    ] = None,
    dtype: o.Dtype = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            rich_help_panel=o.OUTPUT,
            help="Replace an earlier output, and write although the plan says that the pair will not merge.",
        ),
    ] = False,
    as_json: o.Json = False,
    match: o.MatchOption = o.Match.auto,
    weights: Annotated[
        str,
        typer.Option("--weights", metavar="WA,WB", rich_help_panel=o.HOW, help="Shares of A and B; their sum is 1."),
    ] = "0.5,0.5",
    normalize: Annotated[
        bool, typer.Option("--normalize", rich_help_panel=o.HOW, help="Scale the weights to sum 1.")
    ] = False,
    method: Annotated[
        str, typer.Option("--method", metavar="NAME", rich_help_panel=o.HOW, help="How tensors are combined.")
    ] = "linear",
    no_repair: o.NoRepair = False,
    seed: o.Seed = 0,
    batch_size: o.BatchSize = 32,
    device: o.Device = "cpu",
) -> int:
    """Merge A and B into one checkpoint, matched where the plan says so.

    With --data the decision rests on both models' activations, and BatchNorm statistics are re-estimated after the
    merge. The output follows A: tensor order, shards, metadata, config and tokenizer files; mergeid.json beside it
    records what was done. If the pair will not merge, nothing is written and the exit code is 1.
    """
    from mergeid import api

    parsed = o.parse_weights(weights)
    with working(as_json) as work:
        result = api.merge(
            a,
            b,
            output=output,
            weights=parsed,
            normalize=normalize,
            method=method,
            match=match.value,
            data=data,
            repair=not no_repair,
            arch=arch,
            dtype=dtype,
            skip=skip or (),
            force=force,
            seed=seed,
            limit=limit,
            batch_size=batch_size,
            device=device,
            allow_pickle=allow_pickle,
            progress=work.progress,
        )
        if as_json:
            work.emit(result.to_json())
        else:
            from mergeid.commands.show_plan import print_merge

            work.close()
            print_merge(result, work.console)
    return 0
