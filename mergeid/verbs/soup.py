"""``soup``: many fine-tunes of one model into one, chosen or weighted by what they do on examples."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from mergeid.errors import MergeidError
from mergeid.io.opening import Source, is_live
from mergeid.methods.registry import get_method
from mergeid.methods.settings import ByName, MethodRequest, Setting, evaluate
from mergeid.models.workbench import Workbench
from mergeid.request import options as o
from mergeid.request.boundary import verb
from mergeid.request.request import Calibration, Matching, Output, OwnData, bytes_of, check_count
from mergeid.request.usual import Usual, calibration_of, requests_of
from mergeid.results.soup import Ingredient, SoupResult
from mergeid.stages.open import check_matching, open_models, output_path

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mergeid.evaluate.measure import Metrics

HOW = ("greedy", "uniform", "adamerging")


@verb
def soup(
    models: Sequence[Source],
    *,
    data: o.Labelled,
    match: o.Match = "auto",
    matcher: o.Matcher = None,
    how: Annotated[
        str,
        o.Option(
            "greedy: add the models one by one, best first, as long as the average gets no worse; uniform: all of "
            "them; "
            "adamerging: learn a coefficient for each tensor of each model without labels (needs --base).",
            choices=HOW,
        ),
    ] = "greedy",
    dtype: o.Dtype = None,
    force: o.Force = False,
    shard_size: o.ShardSize = None,
    base: Annotated[
        Source | None,
        o.Option("Model that the others were fine-tuned from, for adamerging.", o.INPUT, "MODEL", shown=False),
    ] = None,
    steps: Annotated[int, o.count("Training steps of adamerging.", o.HOW, 1, 100_000)] = 500,
    output: Annotated[
        str | os.PathLike[str] | None,
        o.out("A .safetensors file or a folder. Default: ./soup.safetensors, or ./soup for folders."),
    ] = None,
    batch_size: o.BatchSize = 64,
    **usual: Unpack[Usual],
) -> SoupResult:
    """Average fine-tunes of one model, chosen on validation data (model soups), or with learned coefficients.

    Args:
        models: two or more, aligned with the first where the plan says so.
        data: labelled validation examples; "adamerging" does not use the labels. For it, models of different tasks each
            have their own ({"a": …, "b": …}), on which they are run with their own heads (`skip`).
        how: "greedy", "uniform", or "adamerging" (coefficients of the task vectors, learned so that predictions are
            confident).
        base: the model that they were fine-tuned from, for "adamerging".
        steps: training steps of "adamerging", one batch each.
        output: default ``./soup.safetensors``, for folders ``./soup``; live modules stay in memory without one.
        shard_size: as for `merge`.
        match, matcher: as for `merge`, by weights alone.
        usual: how models are read and the work is done, see `mergeid.request.usual.Usual`.

    Raises:
        WillNotMerge: the plan says no, and `force` is not given.
        MergeidError: anything wrong with the input; nothing was written.
    """
    if how not in HOW:
        raise MergeidError(f"--how {how!r} is not one of {', '.join(HOW)}")
    if len(models) < 2:
        raise MergeidError(f"a soup needs at least two models, got {len(models)}")
    if (base is None) == (how == "adamerging"):
        raise MergeidError("--how adamerging needs --base, and the other ways do not take it")
    check_count("steps", steps)
    run, reading = requests_of(usual, batch_size)
    matching, asked = Matching(match, matcher), Output(output, dtype, force, bytes_of(shard_size))
    check_matching(matching, False)
    calibration = calibration_of(data, usual)
    if isinstance(calibration.data, OwnData) and len(calibration.data.data) != len(models):
        raise MergeidError(
            f"--data names {len(calibration.data.data)} models, and the soup has {len(models)}; give data for each"
        )
    target = None
    if not (is_live(models[0]) and output is None):
        reads = [*models, base, data, reading.config_file]
        target = replace(asked, path=output_path(asked, reads, "soup"))
    met = open_models(Workbench(reading, run), models, base)
    request = MethodRequest(get_method("linear" if base is None else "task_arithmetic"), seed=run.seed)
    from mergeid.stages import soup as stage
    from mergeid.stages.match import notes_of, planned_members
    from mergeid.stages.write import inputs_of, write

    settings = request.over(len(models), met.float_names)
    members = planned_members(met, settings, matching, Calibration(None), asked)
    examples = met.bench.examples(calibration, members.first)
    if examples is None:
        raise MergeidError("a soup is chosen on examples; give them with --data")
    chosen = list(range(len(models)))
    alone: list[Metrics | None] = [None] * len(models)
    found: Metrics | None = None
    entropy: tuple[float, float] | None = None
    if how == "adamerging":
        learned = stage.adamerging(members, examples, met.skip, steps, run)
        request, entropy = replace(request, weights=learned.by_name), learned.entropy
    else:
        measure = stage.measuring(members, examples, met.skip, run)
        if how == "greedy":
            chosen, single, found = stage.greedy(len(models), measure, run)
        else:
            single, found = [measure([i]) for i in chosen], measure(chosen)
        alone = [*single]
        request = replace(request, weights=stage.shares(len(models), chosen))
    members = replace(members, settings=request.over(len(models), met.float_names))
    notes = [*met.notes, *notes_of(members)]
    made = SoupResult(
        how,
        tuple(
            _ingredient(one.source, alone[i], i in chosen, members.settings.weights[i])
            for i, one in enumerate(met.agreed.models)
        ),
        None if found is None else found.loss,
        None if found is None else found.accuracy,
        entropy,
        len(examples),
        notes=notes,
    )
    if target is None:
        return replace(made, state={**met.others, **members.merged_state(met.skip)})
    from mergeid.results.merge import MergeResult

    written = write(MergeResult("soup", plans=members.plans), met, inputs_of(met, members, {}), request, target)
    return replace(made, files=written.files, report=written.report)


def _ingredient(source: str, alone: Metrics | None, kept: bool, weight: Setting) -> Ingredient:
    values = list(weight.values.values()) if isinstance(weight, ByName) else [evaluate(weight, "", 0.0)]
    mean = sum(float(v or 0.0) for v in values) / max(len(values), 1)
    return Ingredient(
        source, None if alone is None else alone.loss, None if alone is None else alone.accuracy, kept, mean
    )
