"""``mergeid plan``: what merging would do, and why; no weights are written."""

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
    base: o.Base = None,
    data: o.Data = None,
    arch: o.Arch = None,
    config: o.Config = None,
    skip: o.Skip = None,
    limit: o.Limit = 512,
    allow_pickle: o.AllowPickle = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", rich_help_panel=o.OUTPUT, help="Also write the plan as JSON."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            rich_help_panel=o.OUTPUT,
            help="Draw the evidence space by space in order of depth: .png or .svg.",
        ),
    ] = None,
    as_json: o.Json = False,
    match: o.MatchOption = o.Match.auto,
    certify: o.Certify = False,
    matcher: o.Matcher = None,
    strict: Annotated[
        bool, typer.Option("--strict", rich_help_panel=o.HOW, help="Exit with 1 if the pair will not merge.")
    ] = False,
    seed: o.Seed = 0,
    batch_size: o.BatchSize = 32,
    device: o.Device = "cpu",
) -> int:
    """Decide for every space of neurons: merge directly, match first, or will not merge.

    Without --data only the weights are compared, which says less, and the plan says so. With --base (or asymmetric
    layers, which store their fixed parts) the structure is judged beside them. No weights are written.
    """
    from mergeid.verbs import api

    check_outputs((a, b, base, data, arch), output=output, plot=plot)
    with working(as_json) as work:
        found = api.plan(
            a,
            b,
            base=base,
            certify=certify,
            data=data,
            arch=arch,
            config=config,
            match=match.value,
            matcher=matcher,
            seed=seed,
            limit=limit,
            batch_size=batch_size,
            device=device,
            skip=skip or (),
            allow_pickle=allow_pickle,
            progress=work.progress,
        )
        result = found.to_json()
        if output is not None:
            write_whole(output, to_text(result) + "\n", "-o")
        if plot is not None:
            from mergeid.reporting.evidence_plot import plot_evidence

            plot_evidence(found, plot)
        if as_json:
            work.emit(result)
        else:
            from mergeid.commands.show_plan import print_plan

            work.close()
            print_plan(found, work.console)
            if output is not None:
                work.say(f"Plan: {output}")
            if plot is not None:
                work.say(f"Plot: {plot}")
    return 1 if strict and found.verdict == "will not merge" else 0
