"""``mergeid report``: one HTML page about a pair."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergeid.commands import options as o
from mergeid.commands.work import check_outputs, working


def command(
    a: o.A,
    b: o.B,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="DATA",
            rich_help_panel=o.INPUT,
            show_default=False,
            help="Labelled examples to measure on: image folder, text or jsonl file, .npz or .safetensors with inputs "
            "and labels, Hugging Face data set, or module:function.",
        ),
    ],
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="DATA",
            rich_help_panel=o.INPUT,
            help="Examples to match on, without labels; DATA itself if not given.",
        ),
    ] = None,
    arch: o.Arch = None,
    config: o.Config = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", metavar="N", min=1, rich_help_panel=o.INPUT, help="Examples to measure on; all if not given."
        ),
    ] = None,
    skip: o.Skip = None,
    allow_pickle: o.AllowPickle = False,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="FILE", rich_help_panel=o.OUTPUT, help="The page."),
    ] = Path("report.html"),
    solve: Annotated[
        bool,
        typer.Option("--solve/--no-solve", rich_help_panel=o.HOW, help="Also try the merge that is solved by layers."),
    ] = True,
    points: Annotated[
        int,
        typer.Option(
            "--points",
            metavar="N",
            min=3,
            max=1_000,
            rich_help_panel=o.HOW,
            help="Points of each curve, with both ends.",
        ),
    ] = 9,
    seed: o.Seed = 0,
    batch_size: o.BatchSize = 64,
    device: o.Device = "cpu",
) -> int:
    """Put all about a pair on one HTML page: verdict, curves, network, prediction, and how to do it again.

    The page needs no network, reads well on a phone, and holds measured values only. No weights are written.
    """
    from mergeid.verbs import api

    check_outputs((a, b, data, calibration, arch), output=output)
    with working() as work:
        found = api.report(
            a,
            b,
            data=data,
            calibration=calibration,
            output=output,
            solve=solve,
            points=points,
            arch=arch,
            config=config,
            skip=skip or (),
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            device=device,
            allow_pickle=allow_pickle,
            progress=work.progress,
        )
        from mergeid.reporting.page.verdict import sentence

        work.say(sentence(found)[1])
        if found.next_command:
            work.say(f"Next: {found.next_command}")
        work.wrote([output])
    return 0
