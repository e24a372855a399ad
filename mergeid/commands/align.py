"""``mergeid align``: B with its neurons in A's order, the same function, for any tool to merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergeid.commands import options as o
from mergeid.commands.work import working


def command(
    b: Annotated[
        str, typer.Argument(metavar="B", help=f"Model whose neurons are put in order: {o.MODEL}.", show_default=False)
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="A", rich_help_panel=o.INPUT, help="Model whose order is taken.", show_default=False
        ),
    ],
    base: o.Base = None,
    data: o.Data = None,
    arch: o.Arch = None,
    config: o.Config = None,
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
            help="A .safetensors file or a folder; ./aligned.safetensors if not given (./aligned for a folder).",
        ),
    ] = None,
    force: o.Force = False,
    as_json: o.Json = False,
    match: o.MatchOption = o.Match.auto,
    certify: o.Certify = False,
    matcher: o.Matcher = None,
    transport: o.Transport = False,
    seed: o.Seed = 0,
    batch_size: o.BatchSize = 32,
    device: o.Device = "cpu",
) -> int:
    """Write B with its neurons permuted into A's order: the same function, ready for any merging tool.

    With --transport its neurons are carried onto A's instead, in A's shapes: a function close to B's, for merging only.
    """
    from mergeid.verbs import api

    with working(as_json) as work:
        result = api.align(
            b,
            to,
            output=output,
            match=match.value,
            base=base,
            certify=certify,
            matcher=matcher,
            transport=transport,
            data=data,
            arch=arch,
            config=config,
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
