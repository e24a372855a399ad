"""``mergeid zip``: two models, perhaps of different tasks, with one trunk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergeid.commands import options as o
from mergeid.commands.work import working


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
            help="Examples of both tasks, whose activations say which features are alike; as for mergeid merge.",
        ),
    ],
    arch: o.Arch = None,
    config: o.Config = None,
    limit: o.Limit = 512,
    allow_pickle: o.AllowPickle = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            rich_help_panel=o.OUTPUT,
            help="A folder, ./zipped if not given; with --one-head as for mergeid merge.",
        ),
    ] = None,
    force: o.Force = False,
    as_json: o.Json = False,
    up_to: Annotated[
        str | None,
        typer.Option(
            "--up-to",
            metavar="MODULE",
            rich_help_panel=o.HOW,
            help="Zip up to this module (such as layer3); what comes after it stays apart. All but the heads if not "
            "given.",
        ),
    ] = None,
    across: Annotated[
        bool,
        typer.Option(
            "--across",
            rich_help_panel=o.HOW,
            help="Only merge a feature of A with one of B, as matching does, and never two of one model.",
        ),
    ] = False,
    one_head: Annotated[
        bool,
        typer.Option(
            "--one-head",
            rich_help_panel=o.HOW,
            help="For models of one task: also average the heads, and write one model.",
        ),
    ] = False,
    no_repair: Annotated[
        bool,
        typer.Option("--no-repair", rich_help_panel=o.HOW, help="Do not estimate BatchNorm statistics again."),
    ] = False,
    seed: o.Seed = 0,
    batch_size: o.BatchSize = 32,
    device: o.Device = "cpu",
) -> int:
    """Zip two models (ZipIt!): merge features that are alike, within each model too, up to the heads or to a layer.

    For convolutional networks and multilayer perceptrons of one architecture; the classes may differ. OUT gets a and
    b, two models with equal tensors up to where the zip ends: each loads where its input loaded, and
    mergeid.load_zipped(OUT) in Python loads both with the common part in memory once.
    """
    from mergeid.verbs import api

    with working(as_json) as work:
        result = api.zip_models(
            a,
            b,
            data=data,
            output=output,
            up_to=up_to,
            across=across,
            one_head=one_head,
            repair=not no_repair,
            arch=arch,
            config=config,
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
            return 0
        zipped = len(result.within)
        inside = sum(result.within.values()) / max(zipped, 1)
        rest = f" of {zipped + len(result.apart)}" if result.apart else ""
        work.say(
            f"Zipped {zipped}{rest} spaces; the common trunk holds {100 * result.share:.1f} % of the parameters, and "
            f"{100 * inside:.0f} % of its features are merged within one model."
        )
        for note in result.notes:
            work.say(f"Note: {note}")
        if result.repaired:
            work.say("BatchNorm statistics were estimated again on the calibration data.")
        work.wrote(result.files)
    return 0
