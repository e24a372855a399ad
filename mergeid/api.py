"""The verbs of mergeid in Python: on files, folders, hub ids and live modules."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from mergeid.errors import MergeidError, WillNotMerge
from mergeid.io.checkpoint import Checkpoint, open_checkpoint
from mergeid.load import Loaded, bare, find_architecture, graph_of, load, load_checkpoint
from mergeid.plugins import Adapter, Architecture

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mergeid.evaluate.result import BarrierResult
    from mergeid.graph.neuron_graph import NeuronGraph
    from mergeid.planning import Plan

Source = Union[str, "os.PathLike[str]", "nn.Module"]
Progress = Callable[[str, int, int], None]
LIMIT = 512
"""Calibration examples that are used unless told otherwise."""

__all__ = [
    "MergeResult",
    "ScrambleResult",
    "align",
    "barrier",
    "graph",
    "load",
    "merge",
    "plan",
    "scramble",
]


@dataclass
class MergeResult:
    """What a merge (or an alignment) did.

    Attributes:
        files: what was written, weights first.
        plan: the decisions; None for a plain merge.
        verdict: "direct", "match" or "will not merge".
        notes: what the user should know.
        repaired: tensors whose BatchNorm statistics were estimated again.
        state: the merged state dict, for live modules.
        report: what happened to the tensors, as JSON.
    """

    verdict: str
    files: list[Path] = field(default_factory=list)
    plan: Plan | None = None
    notes: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    state: dict[str, Tensor] | None = None
    report: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "files": [str(f) for f in self.files],
            "notes": self.notes,
            "repaired": self.repaired,
            "report": self.report,
            "plan": self.plan.to_json() if self.plan else None,
        }


@dataclass
class ScrambleResult:
    """Attributes:
    moved_share: share of the parameters whose tensor has moved.
    max_relative_error: largest output change in float64 over the largest output.
    """

    files: list[Path]
    arch: str
    seed: int
    moved_share: float
    max_relative_error: float
    spaces: int

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "files": [str(f) for f in self.files]}


def graph(
    source: Source,
    example_inputs: Any = None,
    *,
    arch: str | None = None,
    seed: int = 0,
    allow_pickle: bool = False,
    revision: str | None = None,
) -> NeuronGraph:
    """The verified neuron graph of a model.

    Args:
        source: live module, ``.safetensors`` file, folder, hub id, or the name of an architecture (``timm/resnet18``).
        example_inputs: for a live module: a tensor, tuple or dict of keywords that drives every branch.
        arch: the architecture of a file that does not tell.
        seed: of example inputs and of the group elements that verify.

    Raises `MergeidError` when the model is not found or not recognised.
    """
    if isinstance(source, (str, os.PathLike)) and not os.path.exists(source):
        try:
            loaded = bare(os.fspath(source), seed=seed)
        except MergeidError as error:
            if "/" not in os.fspath(source):
                raise
            try:
                loaded = load(source, arch=arch, allow_pickle=allow_pickle, revision=revision, seed=seed)
            except MergeidError as second:
                raise MergeidError(f"{second} (as an architecture: {error})") from None
    else:
        loaded = load(
            source, arch=arch, example_inputs=example_inputs, allow_pickle=allow_pickle, revision=revision, seed=seed
        )
    return graph_of(loaded, seed=seed)


@dataclass
class _Pair:
    a: Loaded
    b: Loaded
    graph: NeuronGraph


def _is_module(source: Any) -> bool:
    return not isinstance(source, (str, os.PathLike))


def _open_pair(
    a: Source, b: Source, skip: Sequence[str], dtype: str | None, allow_pickle: bool
) -> tuple[Checkpoint, Checkpoint]:
    """Both checkpoints, compared by their headers before anything is built."""
    from mergeid.merge.by_torch import check_finite
    from mergeid.merge.compare import plan_tensors

    first, second = (
        open_checkpoint(x, allow_pickle=allow_pickle)
        if isinstance(x, (str, os.PathLike))
        else Checkpoint.from_tensors(x.state_dict(), source=type(x).__name__)
        for x in (a, b)
    )
    tensors = plan_tensors(first, second, skip=skip, dtype=dtype)
    for checkpoint in (first, second):
        check_finite(checkpoint, tensors.merged)
    return first, second


def _load_pair(
    a: Source,
    b: Source,
    *,
    arch: str | None,
    skip: Sequence[str],
    allow_pickle: bool,
    device: str,
    seed: int,
    dtype: str | None = None,
    example_inputs: Any = None,
    progress: Progress | None = None,
) -> _Pair:
    from fnmatch import fnmatchcase

    import torch

    if _is_module(a) != _is_module(b):
        raise MergeidError("one model is a live module and the other a path; load the path into a module first")
    tell = progress or (lambda *_: None)
    first, second = _open_pair(a, b, skip, dtype, allow_pickle)
    if _is_module(a):
        one = load(a, arch=arch, example_inputs=example_inputs, seed=seed)
        two = load(b, arch=arch, example_inputs=one.example if example_inputs is None else example_inputs, seed=seed)
        two.adapter, two.arch = one.adapter, one.arch
        found = graph_of(one, seed=seed)
    else:
        tell("loading", 0, 2)
        adapter, found_arch = find_architecture(first, arch)
        generator = torch.Generator().manual_seed(seed)
        one = load_checkpoint(first, adapter, found_arch, device=device, generator=generator)
        tell("loading", 1, 2)
        same = skip == () or not skip
        other = found_arch if same else find_architecture(second, arch)[1]
        two = load_checkpoint(second, adapter, other, device=device, generator=generator)
        tell("tracing and verifying the neuron graph", 0, 1)
        found = _common_graph(adapter, found_arch, one, seed)
    if skip:
        keys = {one.names.get(n, n) for n in one.names if any(fnmatchcase(n, p) for p in skip)}
        found = found.on_tensors([t for t in found.tensors if t not in keys])
    return _Pair(one, two, found)


def _common_graph(adapter: Adapter, arch: Architecture, loaded: Loaded, seed: int) -> NeuronGraph:
    """The graph on which all architectures that fit the tensors agree.

    Raises `MergeidError` when they do not."""
    import dataclasses
    import warnings

    import torch

    from mergeid.errors import MergeidWarning

    found = graph_of(loaded, seed=seed)
    others = [c for c in arch.candidates if c != arch.name]
    for name in others:
        candidate = dataclasses.replace(arch, name=name, candidates=())
        assert loaded.checkpoint is not None
        other = load_checkpoint(
            loaded.checkpoint, adapter, candidate, device="cpu", generator=torch.Generator().manual_seed(seed)
        )
        if _shape_of(graph_of(other, seed=seed)) != _shape_of(found):
            raise MergeidError(
                f"the tensors of {loaded.source} fit {', '.join(arch.candidates)}, whose neuron graphs differ; "
                f"say which with --arch, for example --arch {adapter.name}/{arch.name}"
            )
    if others:
        warnings.warn(
            f"the tensors of {loaded.source} fit {', '.join(arch.candidates)}; their neuron graphs are the same, going "
            f"on with {arch.name} (choose with --arch)",
            MergeidWarning,
            stacklevel=4,
        )
    return found


def _shape_of(found: NeuronGraph) -> Any:
    return [(s.size, s.blocks, s.parents, [(a.tensor, a.axis, a.index.tolist()) for a in s.axes]) for s in found.spaces]


def _dataset(data: Any, loaded: Loaded, limit: int | None, seed: int) -> tuple[Any, Callable[[Any], Any] | None]:
    """Map-style data and its collate function; (None, None) without data."""
    if data is None:
        return None, None
    if loaded.adapter.name == "torch":
        return data, None
    from mergeid.data import collate, load_data

    dataset = load_data(data, adapter=loaded.adapter, arch=loaded.arch, folder=loaded.folder, limit=limit, seed=seed)
    return dataset, collate


def plan(
    a: Source,
    b: Source,
    *,
    data: Any = None,
    arch: str | None = None,
    match: str = "auto",
    seed: int = 0,
    limit: int | None = LIMIT,
    batch_size: int = 32,
    device: str = "cpu",
    skip: Sequence[str] = (),
    allow_pickle: bool = False,
    example_inputs: Any = None,
    progress: Progress | None = None,
) -> Plan:
    """Decide per space of neurons: merge directly, match first, or will not merge. Nothing is written.

    Args:
        a, b: files, folders, hub ids, or live modules.
        data: calibration data (labels unused), see `mergeid.data.load_data`; without it only the weights speak.
        match: "auto" as decided per space, "always", "never".
        limit: most calibration examples.
        skip: globs of tensor names that the merge takes from A as they are.

    Raises `MergeidError` for anything wrong with the input.
    """
    from mergeid.planning import make_plan

    pair = _load_pair(
        a,
        b,
        arch=arch,
        skip=skip,
        allow_pickle=allow_pickle,
        device=device,
        seed=seed,
        example_inputs=example_inputs,
        progress=progress,
    )
    dataset, collate = _dataset(data, pair.a, limit, seed)
    return make_plan(
        pair.a,
        pair.b,
        dataset=dataset,
        match=match,
        seed=seed,
        batch_size=batch_size,
        collate=collate,
        graph=pair.graph,
        progress=progress,
    )


def merge(
    a: Source,
    b: Source,
    *,
    output: str | os.PathLike[str] | None = None,
    weights: Sequence[float] = (0.5, 0.5),
    normalize: bool = False,
    method: str = "linear",
    match: str = "auto",
    data: Any = None,
    repair: bool = True,
    arch: str | None = None,
    dtype: str | None = None,
    skip: Sequence[str] = (),
    force: bool = False,
    seed: int = 0,
    limit: int | None = LIMIT,
    batch_size: int = 32,
    device: str = "cpu",
    allow_pickle: bool = False,
    example_inputs: Any = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge two models, matched where the plan says so.

    Args:
        a, b: files, folders, hub ids, or live modules (then `MergeResult.state` holds the result).
        output: ``.safetensors`` file or folder; default ``./merged.safetensors``, for folders ``./merged``.
        weights: one per model, summing to 1.
        match: "auto": as decided per space; "never": a plain merge, no model is built; "always": match every space.
        data: calibration data for the evidence and for the BatchNorm statistics.
        repair: estimate the BatchNorm statistics of the merged network again on `data`.
        force: overwrite, and merge even when the plan says that it will not work.

    Raises:
        WillNotMerge: the plan says no (and `force` is not given); nothing was written.
        MergeidError: anything wrong with the input; nothing was written.
    """
    from mergeid.merge.methods import check_weights

    scaled = check_weights(weights, 2, normalize=normalize)
    live = _is_module(a)
    target = None if live and output is None else _output(output, a, b, force)
    if match not in ("auto", "never", "always"):
        raise MergeidError(f"--match {match!r} is not one of auto, never, always")
    made: Plan | None = None
    pair: _Pair | None = None
    repaired: dict[str, Tensor] = {}
    notes: list[str] = []
    if match != "never" or (data is not None and repair):
        from mergeid.planning import make_plan

        pair = _load_pair(
            a,
            b,
            arch=arch,
            skip=skip,
            allow_pickle=allow_pickle,
            device=device,
            seed=seed,
            dtype=dtype,
            example_inputs=example_inputs,
            progress=progress,
        )
        dataset, collate = _dataset(data, pair.a, limit, seed)
        made = make_plan(
            pair.a,
            pair.b,
            dataset=dataset,
            match=match,
            seed=seed,
            batch_size=batch_size,
            collate=collate,
            graph=pair.graph,
            progress=progress,
        )
        notes = list(made.notes)
        if made.verdict == "will not merge" and not force:
            raise WillNotMerge(
                f"{pair.a.source} and {pair.b.source} will not merge: {notes[-1]}; nothing was written (--force merges "
                "them all the same)"
            )
        if repair and dataset is not None:
            repaired = _repair(pair, made, dataset, collate, scaled, method, device, progress)
        elif made.verdict == "match" and _has_batchnorm(pair.a.model):
            notes.append(
                "the BatchNorm statistics are averages, not those of the merged network, which costs much of its "
                "accuracy: give --data (without --no-repair) to estimate them again"
            )
    verdict = made.verdict if made else "direct"
    result = MergeResult(verdict, plan=made, notes=notes, repaired=sorted(repaired))
    if live and target is None:
        assert not isinstance(a, (str, os.PathLike)) and not isinstance(b, (str, os.PathLike))
        result.state = {**_merged_state(a.state_dict(), b.state_dict(), made, scaled, method, skip), **repaired}
        return result
    assert target is not None
    first, second = _checkpoints(pair, a, b, allow_pickle)
    transform, overrides = _for_files(pair, made, repaired, first)
    return _write(result, first, second, target, scaled, method, transform, overrides, dtype, skip, force, progress)


def _checkpoints(pair: _Pair | None, a: Source, b: Source, allow_pickle: bool) -> tuple[Checkpoint, Checkpoint]:
    if pair is not None and pair.a.checkpoint is not None and pair.b.checkpoint is not None:
        return pair.a.checkpoint, pair.b.checkpoint
    return _open_pair_plain(a, b, allow_pickle)


def _open_pair_plain(a: Source, b: Source, allow_pickle: bool) -> tuple[Checkpoint, Checkpoint]:
    first, second = (
        open_checkpoint(x, allow_pickle=allow_pickle)
        if isinstance(x, (str, os.PathLike))
        else Checkpoint.from_tensors(x.state_dict(), source=type(x).__name__)
        for x in (a, b)
    )
    return first, second


def _output(output: str | os.PathLike[str] | None, a: Source, b: Source, force: bool) -> Path:
    from mergeid.io.output import check_output

    if output is None:
        folder = isinstance(a, (str, os.PathLike)) and not str(a).endswith(
            (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
        )
        output = "merged" if folder else "merged.safetensors"
    inputs = [Path(x) for x in (a, b) if isinstance(x, (str, os.PathLike)) and os.path.exists(x)]
    return check_output(output, inputs=inputs, force=force)


def _for_files(
    pair: _Pair | None, made: Plan | None, repaired: Mapping[str, Tensor], first: Checkpoint
) -> tuple[Callable[[str, Tensor], Tensor] | None, dict[str, Tensor]]:
    """The plan in terms of checkpoint tensors: the permutation of B's, and repaired tensors in A's dtype."""
    if pair is None or made is None:
        return None, {}
    transform = None
    if made.moves:
        files = made.graph.renamed({k: n for n, k in pair.b.names.items()})
        element = made.element

        def transform(name: str, value: Tensor) -> Tensor:
            return files.apply(element, name, value)

    keys = {n: k for n, k in pair.a.names.items() if k in repaired and n in first.table}
    return transform, {n: repaired[k].to(first.tensor(n).dtype) for n, k in keys.items()}


def _write(
    result: MergeResult,
    first: Checkpoint,
    second: Checkpoint,
    target: Path,
    weights: Sequence[float],
    method: str,
    transform: Callable[[str, Tensor], Tensor] | None,
    overrides: Mapping[str, Tensor],
    dtype: str | None,
    skip: Sequence[str],
    force: bool,
    progress: Progress | None,
) -> MergeResult:
    from mergeid.merge.apply import merge_checkpoints

    record = {
        "verdict": result.verdict,
        "plan": result.plan.to_json() if result.plan else None,
        "repaired": result.repaired,
    }
    tell = (lambda done, total: progress("writing", done, total)) if progress else None
    report = merge_checkpoints(
        first,
        second,
        target,
        weights=weights,
        method=method,
        transform_b=transform,
        overrides=overrides,
        dtype=dtype,
        skip=skip,
        force=force,
        record=record,
        progress=tell,
    )
    result.files = list(report.files)
    result.report = report.to_json()
    return result


def _merged_state(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    made: Plan | None,
    weights: Sequence[float],
    method: str,
    skip: Sequence[str] = (),
) -> dict[str, Tensor]:
    """The merged state dict in memory, under the model's keys."""
    from fnmatch import fnmatchcase

    from mergeid.merge.methods import get_method

    combine = get_method(method)
    out = {}
    for name, ours in a.items():
        skipped = name not in b or any(fnmatchcase(name, p) for p in skip)
        if skipped or not ours.is_floating_point() or b[name].shape != ours.shape:
            out[name] = ours.clone()
            continue
        theirs = made.graph.apply(made.element, name, b[name]) if made is not None else b[name]
        out[name] = combine([ours, theirs.to(ours.dtype)], weights).to(ours.dtype)
    return out


def _has_batchnorm(model: nn.Module) -> bool:
    from mergeid.merge.repair import batchnorm_layers

    return bool(batchnorm_layers(model))


def _repair(
    pair: _Pair,
    made: Plan,
    dataset: Any,
    collate: Callable[[Any], Any] | None,
    weights: Sequence[float],
    method: str,
    device: str,
    progress: Progress | None,
) -> dict[str, Tensor]:
    """BatchNorm statistics of the merged network on the calibration data, by model key."""
    import copy

    from mergeid.evaluate.measure import make_accelerator
    from mergeid.merge.repair import batchnorm_layers, calibration_batches, reestimate_batchnorm

    if not batchnorm_layers(pair.a.model):
        return {}
    if progress:
        progress("estimating BatchNorm statistics", 0, 1)
    merged = copy.deepcopy(pair.a.model)
    merged.load_state_dict(_merged_state(pair.a.state(), pair.b.state(), made, weights, method), strict=False)
    accelerator = make_accelerator(device)
    batches = calibration_batches(merged, dataset, forward=pair.a.forward, collate=collate, accelerator=accelerator)
    return reestimate_batchnorm(merged, batches, forward=pair.a.forward, accelerator=accelerator)


def align(
    b: Source,
    to: Source,
    *,
    output: str | os.PathLike[str] | None = None,
    match: str = "auto",
    data: Any = None,
    arch: str | None = None,
    force: bool = False,
    seed: int = 0,
    limit: int | None = LIMIT,
    batch_size: int = 32,
    device: str = "cpu",
    skip: Sequence[str] = (),
    allow_pickle: bool = False,
    example_inputs: Any = None,
    progress: Progress | None = None,
) -> MergeResult:
    """B with its neurons in A's order: the same function, for any other merging tool.

    Args:
        b: the model to permute; to: the model whose order it takes. Others as for `merge`.
        output: default ``./aligned.safetensors``, for folders ``./aligned``.

    Raises `MergeidError` for anything wrong with the input; nothing was written.
    """
    from mergeid.planning import make_plan

    live = _is_module(b)
    target = None
    if not (live and output is None):
        default = "aligned" if isinstance(b, (str, os.PathLike)) and os.path.isdir(b) else "aligned.safetensors"
        target = _output(output or default, to, b, force)
    pair = _load_pair(
        to,
        b,
        arch=arch,
        skip=skip,
        allow_pickle=allow_pickle,
        device=device,
        seed=seed,
        example_inputs=example_inputs,
        progress=progress,
    )
    dataset, collate = _dataset(data, pair.a, limit, seed)
    made = make_plan(
        pair.a,
        pair.b,
        dataset=dataset,
        match=match,
        seed=seed,
        batch_size=batch_size,
        collate=collate,
        graph=pair.graph,
        progress=progress,
    )
    result = MergeResult(made.verdict, plan=made, notes=list(made.notes))
    if target is None:
        result.state = made.graph.apply_state(made.element, pair.b.state())
        return result
    assert pair.b.checkpoint is not None
    files = made.graph.renamed({k: n for n, k in pair.b.names.items()})
    result.files = _rewrite(
        pair.b.checkpoint, target, lambda n, t: files.apply(made.element, n, t), {"align": made.to_json()}, force
    )
    return result


def _rewrite(
    checkpoint: Checkpoint,
    output: Path,
    transform: Callable[[str, Tensor], Tensor],
    record: Mapping[str, Any],
    force: bool,
) -> list[Path]:
    """The checkpoint with every tensor transformed (equal shape and dtype), streamed."""
    from mergeid.io.companions import default_companions
    from mergeid.io.stream import CheckpointWriter

    writer = CheckpointWriter(
        output, like=checkpoint, companions=default_companions(checkpoint), record=dict(record), force=force
    )
    with writer:
        for name in writer.order():
            writer.write(name, [transform(name, checkpoint.tensor(name)).contiguous()])
    return list(writer.paths())


def scramble(
    a: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    seed: int = 0,
    arch: str | None = None,
    force: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> ScrambleResult:
    """A random group element applied to a checkpoint: another checkpoint of the same function.

    Args:
        seed: of the group element.

    Raises `MergeidError` for anything wrong with the input; nothing was written.
    """
    from math import prod

    import torch

    target = _output(output, a, a, force)
    loaded = load(a, arch=arch, allow_pickle=allow_pickle)
    found = graph_of(loaded)
    element = found.random_element(torch.Generator().manual_seed(seed))
    files = found.renamed({k: n for n, k in loaded.names.items()})
    assert loaded.checkpoint is not None
    moved = 0
    table = loaded.checkpoint.table
    total = sum(prod(i.shape) for i in table.values())
    for name, info in table.items():
        if any(files.gather_index(name, d, element) is not None for d in range(len(info.shape))):
            moved += prod(info.shape)
    error = _function_change(loaded, found, element)
    record = {"scramble": {"source": loaded.source, "seed": seed, "arch": loaded.arch.id, "max_relative_error": error}}
    paths = _rewrite(loaded.checkpoint, target, lambda n, t: files.apply(element, n, t), record, force)
    return ScrambleResult(paths, loaded.arch.id, seed, moved / max(total, 1), error, len(found.spaces))


def _function_change(loaded: Loaded, found: NeuronGraph, element: Mapping[str, Any]) -> float:
    """Relative output change of these very weights under a group element, in float64."""
    import copy

    import torch

    from mergeid.graph.verify import relative_error

    model = copy.deepcopy(loaded.model).double()
    batch = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in loaded.example.items()
        if k != "labels"
    }
    with torch.no_grad():
        before = [loaded.forward(model, batch)]
        model.load_state_dict(found.apply_state(element, model.state_dict()), strict=False)
        after = [loaded.forward(model, batch)]
    return relative_error(before, after)


def barrier(
    a: Source,
    b: Source,
    *,
    data: Any,
    match: str = "never",
    repair: bool = False,
    points: int = 11,
    calibration: Any = None,
    arch: str | None = None,
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
    label: str = "",
    progress: Progress | None = None,
) -> BarrierResult:
    """Measure loss (and accuracy) along the line from A to B, through Accelerate.

    Args:
        data: labelled data.
        match: "never" measures the pair as it is, "auto" and "always" align B first (evidence from `calibration`).
        repair: estimate the BatchNorm statistics again at every point, on `calibration`.
        points: grid points λ from 0 to 1, at least 2.
        calibration: data for matching and repair; default: `data`.
        limit: most examples to measure on; None: all.
        dtype: "float64" measures in float64.
        resume: JSON file of finished points.

    Raises `MergeidError` for anything wrong with the input.
    """
    import numpy as np
    import torch

    from mergeid.evaluate.interpolate import barrier_curve
    from mergeid.evaluate.measure import make_accelerator

    if points < 2:
        raise MergeidError(f"--points must be at least 2, got {points}")
    pair = _load_pair(
        a,
        b,
        arch=arch,
        skip=skip,
        allow_pickle=allow_pickle,
        device="cpu",
        seed=seed,
        example_inputs=example_inputs,
        progress=progress,
    )
    dataset, collate = _dataset(data, pair.a, limit, seed)
    source = calibration if calibration is not None else data
    held, _ = _dataset(source, pair.a, calibration_limit, seed) if (repair or match != "never") else (None, None)
    state_b = pair.b.state()
    if match != "never":
        from mergeid.planning import make_plan

        made = make_plan(
            pair.a, pair.b, dataset=held, match=match, seed=seed, collate=collate, graph=pair.graph, progress=progress
        )
        state_b = made.graph.apply_state(made.element, state_b)
    chosen = None
    if dtype is not None:
        chosen = getattr(torch, dtype, None)
        if chosen not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise MergeidError(f"--dtype {dtype!r} is not one of float64, float32, bfloat16, float16")
    adapter, found = pair.a.adapter, pair.a.arch
    count = iter(range(1, points + 1))
    return barrier_curve(
        pair.a.state(),
        state_b,
        pair.a.model,
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
