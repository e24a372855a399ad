"""``mergeid barrier``: loss and accuracy on the straight line from A to B, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergeid.commands import options as o
from mergeid.commands.work import check_outputs, to_text, working
from mergeid.io.publish import write_whole


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
            help="Examples to match on and to re-estimate BatchNorm with; DATA itself if not given.",
        ),
    ] = None,
    arch: o.Arch = None,
    config: o.Config = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", metavar="N", min=1, rich_help_panel=o.INPUT, help="Examples taken from DATA; all if not given."
        ),
    ] = None,
    skip: o.Skip = None,
    allow_pickle: o.AllowPickle = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", rich_help_panel=o.OUTPUT, help="Also write the curve as JSON."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", rich_help_panel=o.OUTPUT, help="Draw the curve: .png or .svg."),
    ] = None,
    as_json: o.Json = False,
    match: o.MatchOption = o.Match.never,
    matcher: o.Matcher = None,
    points: Annotated[
        int,
        typer.Option(
            "--points", metavar="N", min=2, max=10_000, rich_help_panel=o.HOW, help="Points on the line, both ends too."
        ),
    ] = 11,
    repair: Annotated[
        bool,
        typer.Option("--repair", rich_help_panel=o.HOW, help="Re-estimate BatchNorm statistics at every point."),
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume", metavar="FILE", rich_help_panel=o.HOW, help="Keep finished points here and take up from them."
        ),
    ] = None,
    mixed_precision: Annotated[
        str | None,
        typer.Option("--mixed-precision", metavar="no|bf16|fp16", rich_help_panel=o.HOW, help="Through Accelerate."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="DTYPE", rich_help_panel=o.HOW, help="Evaluate in this number format."),
    ] = None,
    seed: o.Seed = 0,
    batch_size: o.BatchSize = 64,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="DEVICE",
            rich_help_panel=o.HOW,
            help="cpu, cuda, cuda:1, mps …; as Accelerate chooses if not given.",
        ),
    ] = None,
) -> int:
    """Measure the loss barrier between A and B on labelled data, as they lie or matched.

    Runs under ``accelerate launch`` too; then the first process alone prints and writes.
    """
    from mergeid.verbs import api

    check_outputs((a, b, data, calibration, arch), output=output, plot=plot, resume=resume)
    with working(as_json) as work:
        result = api.barrier(
            a,
            b,
            data=data,
            calibration=calibration,
            match=match.value,
            matcher=matcher,
            repair=repair,
            points=points,
            arch=arch,
            config=config,
            skip=skip or (),
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            device=device,
            dtype=dtype,
            mixed_precision=mixed_precision,
            resume=resume,
            allow_pickle=allow_pickle,
            progress=work.progress,
        )
        if not first_process():
            return 0
        if output is not None:
            write_whole(output, to_text(result.to_json()) + "\n", "-o")
        if plot is not None:
            from mergeid.reporting.plots import plot_barriers

            plot_barriers([result], plot)
        if as_json:
            work.emit(result.to_json())
        else:
            from mergeid.reporting.tables import barrier_points, barrier_summary

            work.close()
            console = work.console
            console.print(barrier_points([result], width=console.width))
            console.print()
            console.print(barrier_summary([result], width=console.width))
            work.wrote([p for p in (output, plot) if p is not None])
    return 0


def first_process() -> bool:
    """Whether this is the process that reports (the only one unless launched by Accelerate or torchrun)."""
    from accelerate import PartialState

    return PartialState().is_main_process
