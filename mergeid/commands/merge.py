"""``mergeid merge``: two checkpoints or more in, one out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergeid.commands import options as o
from mergeid.commands.work import working
from mergeid.errors import MergeidError
from mergeid.io.output import check_output

if TYPE_CHECKING:
    from mergeid.methods.recipe import Recipe
    from mergeid.verbs.merge import MergeResult


def command(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="A B [C …]",
            help=f"Models: {o.MODEL}; the output follows the first. Or one recipe, a .yaml file.",
            show_default=False,
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            rich_help_panel=o.INPUT,
            help="What the models were fine-tuned from, for methods that merge task vectors.",
            show_default=False,
        ),
    ] = None,
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
            help="A .safetensors file or a folder; ./merged.safetensors if not given (./merged for a folder).",
        ),
    ] = None,
    dtype: o.Dtype = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            rich_help_panel=o.OUTPUT,
            help="Replace an earlier output, and write although mergeid says that the models will not merge.",
        ),
    ] = False,
    as_json: o.Json = False,
    match: o.MatchOption = o.Match.auto,
    matcher: o.Matcher = None,
    transport: o.Transport = False,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weights",
            metavar="[GLOB=]WA,WB…",
            rich_help_panel=o.HOW,
            help="One per model, equal if not given; shares sum to 1, factors of task vectors need not. With a GLOB "
            "for the tensors that match it (may be given several times).",
        ),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(
            "--normalize/--no-normalize",
            rich_help_panel=o.HOW,
            show_default=False,
            help="Scale the weights to sum 1, or take them as they are whatever their sum.",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            rich_help_panel=o.HOW,
            help="linear, slerp, nuslerp, multislerp, karcher; with --base task_arithmetic, ties, dare_linear, "
            "dare_ties, della, della_linear, breadcrumbs, breadcrumbs_ties, sce, ram, ramplus_tl, model_stock; B into "
            "A: nearswap, arcee_fusion; with --data fisher, regmean.",
        ),
    ] = "linear",
    density: Annotated[
        str | None,
        typer.Option(
            "--density",
            metavar="D[,D…]",
            rich_help_panel=o.HOW,
            help="Share of each task vector that is kept (ties, dare, della, breadcrumbs): one, or one per model.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            rich_help_panel=o.HOW,
            help="Another parameter of the method, such as lambda=0.8 (may be given several times).",
        ),
    ] = None,
    repair: Annotated[
        o.Repair,
        typer.Option(
            "--repair",
            rich_help_panel=o.HOW,
            help="bn: estimate BatchNorm statistics again; repair: rescale pre-activations (REPAIR); solve: every "
            "layer in closed form, to answer as the models do on average; auto: solve, bn, or repair of a network "
            "without BatchNorm, where that is nearer to the models; none.",
        ),
    ] = o.Repair.auto,
    no_repair: Annotated[
        bool, typer.Option("--no-repair", rich_help_panel=o.HOW, help="The same as --repair none.")
    ] = False,
    refuse_above: o.RefuseAbove = 0.5,
    seed: o.Seed = 0,
    batch_size: o.BatchSize = 32,
    device: o.Device = "cpu",
) -> int:
    """Merge models into one checkpoint, matched where the plan says so.

    With --data the decision rests on the models' activations; the merges at hand, with and without repair, are then run
    on the data, and the one that is nearest to the models is written. Every further model is brought into A's order.
    The output follows A: tensor order, shards, metadata, config and tokenizer files; mergeid.json beside it records
    what was done. If they will not merge, nothing is written and the exit code is 1. A recipe takes the fields of
    mergekit's.
    """
    from mergeid.verbs import api

    if method in ("zip", "zipit"):
        raise MergeidError("--method zip is a command of its own, since it may leave two heads; see mergeid zip --help")
    told = o.parse_settings([*([f"density={density}"] if density is not None else []), *(settings or [])])
    what: dict[str, Any] = {
        "weights": o.parse_all_weights(weights or []),
        "normalize": normalize,
        "method": method,
        "base": base,
        "parameters": told,
        "dtype": dtype,
    }
    stages: list[Recipe] = []
    if len(models) == 1 and models[0].endswith((".yaml", ".yml")):
        from mergeid.methods.recipe import read_stages

        given = {
            "--weights": weights,
            "--normalize": normalize is not None,
            "--method": method != "linear",
            "--base": base,
            "--density": density,
            "--set": settings,
            "--dtype": dtype,
        }
        for option in (option for option, value in given.items() if value):
            raise MergeidError(f"{option} does not go with a recipe; write it into {models[0]}")
        stages = read_stages(models[0])
        if output is not None:
            check_output(output, inputs=models, force=force)  # replacing a folder would take the recipe in it along
    elif len(models) == 1 and base is None:
        raise MergeidError("Missing argument 'B'; expected two models at least, or one recipe (a .yaml file)")

    def run(sources: Sequence[Any], target: str | os.PathLike[str] | None, what: Mapping[str, Any]) -> MergeResult:
        return api.merge(
            sources,
            output=target,
            **what,
            match=match.value,
            matcher=matcher,
            transport=transport,
            data=data,
            repair="none" if no_repair else repair.value,
            refuse_above=refuse_above,
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

    with working(as_json) as work:
        if stages:
            from mergeid.stages.recipe import merge_stages

            result = merge_stages(stages, output, run, allow_pickle)
        else:
            result = run(models, output, what)
        if as_json:
            work.emit(result.to_json())
        else:
            from mergeid.commands.show_plan import print_merge

            work.close()
            print_merge(result, work.console)
    return 0
