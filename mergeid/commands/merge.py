"""``mergeid merge``: two checkpoints or more in, one out."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from mergeid.commands import arguments as o
from mergeid.commands.terminal import Call, command_of
from mergeid.commands.work import check_outputs, working, write_report
from mergeid.errors import MergeidError
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
        o.several("A B [C …]", f"Models: {o.MODEL}; the output follows the first. Or one recipe, a .yaml file."),
    ],
    page: o.Page = None,
    as_json: o.Json = False,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weights",
            metavar="[GLOB=]WA,WB…",
            rich_help_panel=HOW,
            help="One per model, equal if not given; shares sum to 1, factors of task vectors need not. With a GLOB "
            "for the tensors that match it (may be given several times).",
        ),
    ] = None,
    density: Annotated[
        str | None,
        o.how("--density", "D[,D…]", "Share of each task vector that is kept (ties, dare, …): one, or one per model."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        o.how("--set", "NAME=VALUE", "Another parameter of the method, as in lambda=0.8 (may be given several times)."),
    ] = None,
    repair: Annotated[
        o.Repair,
        typer.Option(
            "--repair",
            rich_help_panel=HOW,
            help="bn: estimate BatchNorm statistics again; repair: rescale pre-activations (REPAIR); solve: every "
            "layer in closed form, to answer as the models do on average; solve+polish: then "
            "distilled from the models' predictions; auto: solve, bn, or repair of a network "
            "without BatchNorm, where that is nearer to the models; none.",
        ),
    ] = o.Repair.auto,
    no_repair: Annotated[
        bool, typer.Option("--no-repair", rich_help_panel=HOW, help="The same as --repair none.")
    ] = False,
) -> int:
    """Merge models into one checkpoint, matched where the plan says so.

    With --data the decision rests on the models' activations; the merges at hand, with and without repair, are then run
    on the data, and the one that is nearest to the models is written. Every further model is brought into A's order.
    The output follows A: tensor order, shards, metadata, config and tokenizer files; mergeid.json beside it records
    what was done. If they will not merge, nothing is written and the exit code is 1. A recipe takes the fields of
    mergekit's.
    """
    if call.text("method") in ("zip", "zipit"):
        raise MergeidError("--method zip is a command of its own, since it may leave two heads; see mergeid zip --help")
    stage = "none" if no_repair else repair.value
    told = o.parse_settings([*([f"density={density}"] if density is not None else []), *(settings or [])])
    stages: list[Recipe] = []
    if len(models) == 1 and models[0].endswith((".yaml", ".yml")):
        beside = {"--weights": weights, "--density": density, "--set": settings}
        stages = _stages(models[0], call, [option for option, value in beside.items() if value])
    elif len(models) == 1 and not call.given("base"):
        raise MergeidError("Missing argument 'B'; expected two models at least, or one recipe (a .yaml file)")
    check_outputs((*models, *call.reads), report=page)
    with working(as_json) as work:
        if stages:
            from mergeid.stages.recipe import Prepared, merge_stages

            def merged(done: Prepared, target: str | os.PathLike[str] | None) -> MergeResult:
                told = done.recipe
                how = partial(call, method=told.method, weights=told.weights, parameters=told.parameters)
                how = partial(how, normalize=told.normalize, dtype=told.dtype, tokenizer=told.tokenizer)
                how = partial(how, chat_template=told.chat_template, repair=stage, progress=work.progress)
                return how(done.models, base=done.base, output=target)

            result = merge_stages(stages, call.path("output"), merged, call.given("allow_pickle"))
        else:
            shares = o.parse_all_weights(weights or [])
            result = call(models, weights=shares, parameters=told, repair=stage, progress=work.progress)
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

    own = [f"--{k}" for k in ("normalize", "method", "base", "dtype") if call.given(k)]
    for option in (*beside, *own):
        raise MergeidError(f"{option} does not go with a recipe; write it into {path}")
    stages = read_stages(path)
    if len(stages) > 1 and call.given("resume"):
        raise MergeidError(f"--resume goes with a single merge, and {path} has {len(stages)} stages; leave it out")
    output = call.path("output")
    if output is not None:  # replacing a folder would take the recipe in it along
        check_output(output, inputs=[path], force=call.given("force"))
    return stages
