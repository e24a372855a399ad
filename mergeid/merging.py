"""Merge two models, or bring one into the other's order."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid.errors import MergeidError, WillNotMerge
from mergeid.io.checkpoint import Checkpoint
from mergeid.pair import LIMIT, Pair, Progress, Source, is_module, open_plain, output_path
from mergeid.planned import plan_pair

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mergeid.planning import Plan


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
    live = is_module(a)
    target = None if live and output is None else output_path(output, a, b, force)
    if match not in ("auto", "never", "always"):
        raise MergeidError(f"--match {match!r} is not one of auto, never, always")
    made: Plan | None = None
    pair: Pair | None = None
    repaired: dict[str, Tensor] = {}
    notes: list[str] = []
    if match != "never" or (data is not None and repair):
        planned = plan_pair(
            a,
            b,
            data=data,
            arch=arch,
            match=match,
            seed=seed,
            limit=limit,
            batch_size=batch_size,
            device=device,
            skip=skip,
            allow_pickle=allow_pickle,
            example_inputs=example_inputs,
            progress=progress,
            dtype=dtype,
        )
        made, pair, dataset, collate = planned.plan, planned.pair, planned.dataset, planned.collate
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


def _checkpoints(pair: Pair | None, a: Source, b: Source, allow_pickle: bool) -> tuple[Checkpoint, Checkpoint]:
    if pair is not None and pair.a.checkpoint is not None and pair.b.checkpoint is not None:
        return pair.a.checkpoint, pair.b.checkpoint
    return open_plain(a, b, allow_pickle)


def _for_files(
    pair: Pair | None, made: Plan | None, repaired: Mapping[str, Tensor], first: Checkpoint
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
    from mergeid.merge.asymmetric import note

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
    result.notes += note(report.overridden)
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

    from mergeid.merge.asymmetric import effective_averages
    from mergeid.merge.methods import get_method
    from mergeid.nn.names import is_asymmetric

    combine = get_method(method)
    out = {}
    merged: list[str] = []
    for name, ours in a.items():
        skipped = name not in b or any(fnmatchcase(name, p) for p in skip)
        if skipped or not ours.is_floating_point() or b[name].shape != ours.shape:
            out[name] = ours.clone()
            continue
        theirs = made.graph.apply(made.element, name, b[name]) if made is not None else b[name]
        out[name] = combine([ours, theirs.to(ours.dtype)], weights).to(ours.dtype)
        merged.append(name)
    if is_asymmetric(merged):

        def permuted(name: str) -> Tensor:
            return made.graph.apply(made.element, name, b[name]) if made is not None else b[name]

        out |= effective_averages(merged, a.__getitem__, permuted, combine, weights)
    return out


def _has_batchnorm(model: nn.Module) -> bool:
    from mergeid.merge.repair import batchnorm_layers

    return bool(batchnorm_layers(model))


def _repair(
    pair: Pair,
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
    from mergeid.state import load_weights

    if not batchnorm_layers(pair.a.model):
        return {}
    if progress:
        progress("estimating BatchNorm statistics", 0, 1)
    merged = copy.deepcopy(pair.a.model)
    load_weights(merged, _merged_state(pair.a.state(), pair.b.state(), made, weights, method))
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
    live = is_module(b)
    target = None
    if not (live and output is None):
        default = "aligned" if isinstance(b, (str, os.PathLike)) and os.path.isdir(b) else "aligned.safetensors"
        target = output_path(output or default, to, b, force)
    from mergeid.scrambling import rewrite

    planned = plan_pair(
        to,
        b,
        data=data,
        arch=arch,
        match=match,
        seed=seed,
        limit=limit,
        batch_size=batch_size,
        device=device,
        skip=skip,
        allow_pickle=allow_pickle,
        example_inputs=example_inputs,
        progress=progress,
    )
    made, pair = planned.plan, planned.pair
    result = MergeResult(made.verdict, plan=made, notes=list(made.notes))
    if target is None:
        result.state = made.graph.apply_state(made.element, pair.b.state())
        return result
    assert pair.b.checkpoint is not None
    files = made.graph.renamed({k: n for n, k in pair.b.names.items()})
    result.files = rewrite(
        pair.b.checkpoint, target, lambda n, t: files.apply(made.element, n, t), {"align": made.to_json()}, force
    )
    return result
