"""``mergeid merge``: two checkpoints or more in, one out."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from mergeid.basics.processes import is_first
from mergeid.commands import arguments as o
from mergeid.commands.launch import together
from mergeid.commands.terminal import Call, command_of
from mergeid.commands.work import check_outputs, working, write_report
from mergeid.errors import MergeidError
from mergeid.io.opening import open_checkpoint
from mergeid.io.output import check_output
from mergeid.request.options import HOW
from mergeid.verbs.merge import merge

if TYPE_CHECKING:
    import os

    from mergeid.methods.recipe import Recipe
    from mergeid.results.merge import MergeResult


@command_of(merge)
def command(
    call: Call[MergeResult],
    models: Annotated[
        list[str],
        o.several("A B [C …]", f"Models: {o.MODEL}; the output follows the first. Or one recipe (a .yaml file)."),
    ],
    page: o.Page = None,
    as_json: o.Json = False,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weights",
            metavar="[GLOB=]WA,WB…",
            rich_help_panel=HOW,
            help="One weight per model (default: equal). They sum to 1, except for methods that merge task vectors. "
            "With GLOB= they apply to the tensors that match (repeatable).",
        ),
    ] = None,
    density: Annotated[
        str | None,
        o.how(
            "--density", "D[,D…]", "Fraction of each task vector to keep (ties, dare, …): one value, or one per model."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        o.how("--set", "NAME=VALUE", "Any other parameter of the method, such as lambda=0.8 (repeatable)."),
    ] = None,
    repair: Annotated[
        o.Repair,
        typer.Option(
            "--repair",
            rich_help_panel=HOW,
            help="bn: re-estimate BatchNorm statistics; repair: rescale pre-activations (REPAIR); regmean: "
            "RegMean's linear layers; solve: refit every layer in closed form to the mean of the models' outputs; "
            "solve+lean: the same, but hidden layers lean to one model; solve+polish: solve, then distil the models' "
            "predictions; auto: the one that brings the merge nearer to the models, or none; none: nothing.",
        ),
    ] = o.Repair.auto,
    no_repair: Annotated[
        bool, typer.Option("--no-repair", rich_help_panel=HOW, help="The same as --repair none.")
    ] = False,
) -> int:
    """Merge models into one checkpoint, matched where the plan says so.

    With --data the decision is based on the models' activations. The candidate merges, with and without repair, are
    then run on the data, and the one nearest to the models is written. Every further model is brought into A's order.
    The output follows A: tensor order, shards, metadata, config and tokenizer files. mergeid.json beside it records
    what was done. If the models will not merge, nothing is written and the exit code is 1. Recipes have mergekit's
    format. Under `accelerate launch` the processes share the work, and the first writes and prints.
    """
    if call.text("method") in ("zip", "zipit"):
        raise MergeidError("zip is a command of its own, because its result may have two heads; see mergeid zip --help")
    stage = "none" if no_repair else repair.value
    told = o.parse_settings([*([f"density={density}"] if density is not None else []), *(settings or [])])
    stages: list[Recipe] = []
    if len(models) == 1 and models[0].endswith((".yaml", ".yml")):
        beside = {"--weights": weights, "--density": density, "--set": settings}
        stages = _stages(models[0], call, [option for option, value in beside.items() if value])
    elif len(models) == 1 and not call.given("base"):
        raise MergeidError("Missing argument 'B'; expected at least two models, or one recipe (a .yaml file)")
    check_outputs((*models, *call.reads), call.given("force"), report=page)
    in_steps = len(stages) > 1 or call.given("as_adapter")  # a step reads what the one before it wrote
    if in_steps and not is_first():
        return 0
    with working(as_json) as work, nullcontext() if in_steps else together(call):
        if stages:
            from mergeid.stages.recipe import Prepared, merge_stages

            def merged(done: Prepared, target: str | os.PathLike[str] | None) -> MergeResult:
                told = done.recipe
                how = partial(call, method=told.method, weights=told.weights, parameters=told.parameters)
                how = partial(how, normalize=told.normalize, dtype=told.dtype, tokenizer=told.tokenizer)
                how = partial(how, chat_template=told.chat_template, repair=stage, progress=work.progress)
                return how(done.models, base=done.base, output=target)

            pickles, floats = call.given("allow_pickle"), call.given("dequantise")
            opened = partial(open_checkpoint, allow_pickle=pickles, dequantise=floats)
            result = merge_stages(stages, call.path("output"), merged, opened)
        else:
            shares = o.parse_all_weights(weights or [])
            result = call(*models, weights=shares, parameters=told, repair=stage, progress=work.progress)
        if not is_first():
            return 0
        if page is not None:
            write_report(page, result, models)
        if as_json:
            work.emit(result.to_json())
        else:
            from mergeid.reporting.show_merge import print_merge

            work.close()
            print_merge(result, work.console)
            work.wrote([page] if page is not None else [])
    return 0


def _stages(path: str, call: Call[MergeResult], beside: list[str]) -> list[Recipe]:
    """What a recipe says. Raises `MergeidError` for options that it says itself."""
    from mergeid.methods.recipe import read_stages  # pydantic takes its time

    if call.given("plan"):
        raise MergeidError(f"--plan is for two models given by name, not for a recipe ({path}); leave it out")
    own = [f"--{k}" for k in ("normalize", "method", "base", "dtype") if call.given(k)]
    for option in (*beside, *own):
        raise MergeidError(f"{option} cannot be combined with a recipe; set it in {path}")
    stages = read_stages(path)
    if len(stages) > 1 and call.given("resume"):
        raise MergeidError(f"--resume works for a single merge only, but {path} has {len(stages)} stages; leave it out")
    output = call.path("output")
    if output is not None:  # replacing a folder would take the recipe in it along
        check_output(output, inputs=[path], force=call.given("force"))
    return stages
