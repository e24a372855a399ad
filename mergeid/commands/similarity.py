"""``mergeid similarity``: how alike the layers of two models are."""

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
            help="Examples to run both models on: image folder, text or jsonl file, .npz or .safetensors with inputs, "
            "Hugging Face data set, or module:function.",
        ),
    ],
    layers: Annotated[
        list[str] | None,
        typer.Option(
            "--layers",
            metavar="GLOB",
            rich_help_panel=o.INPUT,
            help="Modules to compare; all with a matrix of weights if not given (may be given several times).",
        ),
    ] = None,
    arch: o.Arch = None,
    limit: o.Limit = 512,
    allow_pickle: o.AllowPickle = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", rich_help_panel=o.OUTPUT, help="Also write the result as JSON."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            rich_help_panel=o.OUTPUT,
            help="Draw CKA of all layers of A with all of B as a heat map: .png or .svg.",
        ),
    ] = None,
    as_json: o.Json = False,
    seed: o.Seed = 0,
    batch_size: o.BatchSize = 32,
    device: o.Device = "cpu",
) -> int:
    """Compare the layers of A and B on the same data: CKA (plain and unbiased), SVCCA and PWCCA."""
    from mergeid.verbs import api

    check_outputs((a, b, data, arch), output=output, plot=plot)
    with working(as_json) as work:
        result = api.similarity(
            a,
            b,
            data=data,
            layers=layers or ("*",),
            arch=arch,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            device=device,
            allow_pickle=allow_pickle,
            progress=work.progress,
        )
        if output is not None:
            write_whole(output, to_text(result.to_json()) + "\n", "-o")
        if plot is not None:
            from mergeid.reporting.plots import plot_heat_map

            plot_heat_map(
                result.names_a,
                result.names_b,
                result.cka_map,
                plot,
                label="unbiased CKA",
                axes=("layers of A", "layers of B"),
            )
        if as_json:
            work.emit(result.to_json())
        else:
            from mergeid.reporting.tables import similarity_table

            work.close()
            work.console.print(similarity_table(result, width=work.console.width))
            for note in result.notes:
                work.say(f"Note: {note}.")
            work.wrote([p for p in (output, plot) if p is not None])
    return 0
