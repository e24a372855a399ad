"""The verbs of mergeid in Python: on files, folders, hub ids and live modules."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid.errors import MergeidError
from mergeid.models.load import bare, graph_of, load
from mergeid.models.loaded import Example, further_batches
from mergeid.models.pair import LIMIT, Progress, Source, dataset_of, load_pair
from mergeid.request.boundary import verb
from mergeid.stages.planned import plan_pair
from mergeid.verbs.align import align
from mergeid.verbs.extract import extract
from mergeid.verbs.merge import MergeResult, merge
from mergeid.verbs.predict import predict
from mergeid.verbs.report import report
from mergeid.verbs.scramble import ScrambleResult, scramble
from mergeid.verbs.similarity import SimilarityResult, similarity
from mergeid.verbs.sketch import PredictionMatrix, predict_sketches, sketch
from mergeid.verbs.zip import ZipResult, load_zipped, zip_models

if TYPE_CHECKING:
    from mergeid.evaluate.result import BarrierResult
    from mergeid.neuron_graph.by_hand import Given
    from mergeid.neuron_graph.neuron_graph import NeuronGraph
    from mergeid.stages.plan import Plan

__all__ = [
    "LIMIT",
    "MergeResult",
    "PredictionMatrix",
    "ScrambleResult",
    "SimilarityResult",
    "ZipResult",
    "align",
    "barrier",
    "extract",
    "graph",
    "load",
    "load_zipped",
    "merge",
    "plan",
    "predict",
    "predict_sketches",
    "report",
    "scramble",
    "similarity",
    "sketch",
    "zip_models",
]


@verb
def graph(
    source: Source,
    example_inputs: Any = None,
    *,
    more_inputs: Sequence[Any] = (),
    outputs: Sequence[str] = (),
    freeze: Sequence[str] = (),
    tie: Sequence[tuple[str, str]] = (),
    graph: Given | None = None,
    arch: str | None = None,
    seed: int = 0,
    allow_pickle: bool = False,
    revision: str | None = None,
) -> NeuronGraph:
    """The verified neuron graph of a model.

    Args:
        source: live module, ``.safetensors`` file, folder, hub id, the name of an architecture (``timm/resnet18``), or
            the path of a config.json; a bare architecture too large to run is traced without weights.
        example_inputs: for a live module: a tensor, tuple or dict of keywords that drives every branch.
        more_inputs: a list of further example inputs, where one does not drive every branch. The facts of all passes
            make one graph, which is verified on every input.
        outputs: names or globs of those outputs of a live module that count (``"logits"``, ``"0"``); by default every
            tensor that it returns, so that none of them may change.
        freeze: axes that must not move: ``"TENSOR[AXIS]"`` or ``"TENSOR"``, TENSOR may be a glob.
        tie: pairs of axes (``("a.weight[0]", "b.weight[0]")``) whose neurons move together.
        graph: a graph written or corrected by hand (a path, the exchange format, or a `NeuronGraph`): it is verified
            instead of tracing one, and what does not hold is frozen.
        arch: the architecture of a file that does not tell.
        seed: of example inputs and of the group elements that verify.

    Raises `MergeidError` when the model is not found or not recognised, does not run on the inputs, or when what is
    said by hand does not fit it.
    """
    from mergeid.neuron_graph.by_hand import Constraints, read_graph

    if graph is not None and (freeze or tie):
        raise MergeidError(
            "graph= takes the place of tracing, and freeze= and tie= are for a traced graph; edit the graph"
        )
    given = read_graph(graph) if graph is not None else None
    config = isinstance(source, (str, os.PathLike)) and os.fspath(source).endswith(".json")
    if isinstance(source, (str, os.PathLike)) and (config or not os.path.exists(source)):
        try:
            loaded = bare(os.fspath(source), seed=seed)
        except MergeidError as error:
            if config or "/" not in os.fspath(source):
                raise
            try:
                loaded = load(source, arch=arch, allow_pickle=allow_pickle, revision=revision, seed=seed)
            except MergeidError as second:
                raise MergeidError(f"{second} (as an architecture: {error})") from None
    else:
        loaded = load(
            source,
            arch=arch,
            example_inputs=example_inputs,
            outputs=outputs,
            allow_pickle=allow_pickle,
            revision=revision,
            seed=seed,
        )
    more = further_batches(more_inputs, loaded)
    return graph_of(loaded, seed=seed, more=more, constraints=Constraints(freeze, tie), given=given)


@verb
def plan(
    a: Source,
    b: Source,
    *,
    data: Any = None,
    arch: str | None = None,
    config: str | None = None,
    match: str = "auto",
    matcher: str | None = None,
    seed: int = 0,
    limit: int | None = LIMIT,
    batch_size: int = 32,
    device: str = "cpu",
    skip: Sequence[str] = (),
    allow_pickle: bool = False,
    example_inputs: Any = None,
    outputs: Sequence[str] = (),
    base: Source | None = None,
    certify: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Decide per space of neurons: merge directly, match first, or will not merge. Nothing is written.

    Args:
        a, b: files, folders, hub ids, or live modules.
        data: calibration data (labels unused), see `mergeid.data.load_data`; without it only the weights speak.
        config: "a" or "b": whose config counts where they differ in what the network computes; None: that is refused.
        match: "auto" as decided per space, "always", "never".
        matcher: how neurons are matched (`mergeid.matchers.matcher_names`); default: combined with data, else weight.
        limit: most calibration examples.
        skip: globs of tensor names that the merge takes from A as they are.
        outputs: names or globs of those outputs of live modules that count (``"logits"``, ``"0"``); default: all.
        base: what both models were fine-tuned from. With data, and with a base or the fixed parts that asymmetric
            layers store, every space's record gets the structural margins of both models (`structure`).
        certify: compute the layers' radii of stability too.

    Raises `MergeidError` for anything wrong with the input.
    """
    return plan_pair(
        a,
        b,
        data=data,
        arch=arch,
        config=config,
        match=match,
        matcher=matcher,
        seed=seed,
        limit=limit,
        batch_size=batch_size,
        device=device,
        skip=skip,
        allow_pickle=allow_pickle,
        example_inputs=Example.of(example_inputs, outputs),
        base=base,
        certify=certify,
        progress=progress,
    ).plan


@verb
def barrier(
    a: Source,
    b: Source,
    *,
    data: Any,
    match: str = "never",
    matcher: str | None = None,
    repair: bool = False,
    points: int = 11,
    calibration: Any = None,
    arch: str | None = None,
    config: str | None = None,
    skip: Sequence[str] = (),
    limit: int | None = None,
    calibration_limit: int | None = LIMIT,
    batch_size: int = 64,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    mixed_precision: str | None = None,
    resume: str | os.PathLike[str] | None = None,
    allow_pickle: bool = False,
    example_inputs: Any = None,
    outputs: Sequence[str] = (),
    label: str = "",
    progress: Progress | None = None,
) -> BarrierResult:
    """Measure loss (and accuracy) along the line from A to B, through Accelerate.

    Args:
        data: labelled data.
        match: "never" measures the pair as it is, "auto" and "always" align B first (evidence from `calibration`).
        matcher, config: as for `plan`.
        repair: estimate the BatchNorm statistics again at every point, on `calibration`.
        points: grid points λ from 0 to 1, at least 2.
        calibration: data for matching and repair; default: `data`.
        limit: most examples to measure on; None: all.
        dtype: "float64" measures in float64.
        outputs: names or globs of those outputs of live modules that count (``"logits"``, ``"0"``); default: all.
        resume: JSON file of finished points.

    Raises `MergeidError` for anything wrong with the input.
    """
    if points < 2:
        raise MergeidError(f"--points must be at least 2, got {points}")
    if matcher is not None:
        from mergeid.matchers.protocol import check_matcher

        check_matcher(matcher, match, True)
    pair = load_pair(
        a,
        b,
        arch=arch,
        config=config,
        skip=skip,
        allow_pickle=allow_pickle,
        device="cpu",
        seed=seed,
        example_inputs=Example.of(example_inputs, outputs),
        progress=progress,
    )
    import numpy as np
    import torch

    from mergeid.evaluate.interpolate import barrier_curve
    from mergeid.evaluate.measure import make_accelerator
    from mergeid.nn.folding import fold_line

    dataset, collate = dataset_of(data, pair.a, limit, seed)
    source = calibration if calibration is not None else data
    held, _ = dataset_of(source, pair.a, calibration_limit, seed) if (repair or match != "never") else (None, None)
    state_b = pair.b.state()
    if match != "never":
        from mergeid.stages.plan import make_plan

        made = make_plan(
            pair.a,
            pair.b,
            dataset=held,
            match=match,
            matcher=matcher,
            seed=seed,
            collate=collate,
            graph=pair.graph,
            structure=False,
            progress=progress,
        )
        state_b = made.graph.apply_state(made.element, state_b)
    state_a, state_b, model = fold_line(pair.a.state(), state_b, pair.a.model)
    chosen = None
    if dtype is not None:
        chosen = getattr(torch, dtype, None)
        if chosen not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise MergeidError(f"--dtype {dtype!r} is not one of float64, float32, bfloat16, float16")
    adapter, found = pair.a.adapter, pair.a.arch
    count = iter(range(1, points + 1))
    return barrier_curve(
        state_a,
        state_b,
        model,
        dataset,
        forward=adapter.forward,
        loss=lambda out, batch: adapter.loss(found, out, batch),
        lambdas=tuple(np.linspace(0, 1, points).tolist()),
        repair=repair,
        calibration=held,
        batch_size=batch_size,
        dtype=chosen,
        mixed_precision=mixed_precision,
        accelerator=make_accelerator(device),
        collate=collate,
        resume=Path(resume) if resume else None,
        label=label or {"never": "direct", "auto": "mergeid", "always": "matched"}[match],
        progress=(lambda *_: progress("measuring", next(count), points)) if progress else None,
    )
