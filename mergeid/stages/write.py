"""Write: the merged checkpoint and its record, or one checkpoint with every tensor transformed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergeid.combine.apply import Inputs, Transform, merge_checkpoints
from mergeid.combine.asymmetric import note
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.derived import origins
from mergeid.io.dtypes import torch_dtype
from mergeid.models.converted import Converted, as_stored, measured_of, overriding
from mergeid.request.request import Output, Run

if TYPE_CHECKING:
    from torch import Tensor

    from mergeid.methods.settings import MethodRequest
    from mergeid.results.merge import MergeResult
    from mergeid.stages.members import Member, Members
    from mergeid.stages.open import Met

PIECE = 1 << 23
"""Numbers of a tensor that are written at once."""


def inputs_of(met: Met, members: Members | None, repaired: Mapping[str, Tensor]) -> Inputs:
    """What a merge reads: checkpoints, how their tensors are moved, and what was measured and repaired.

    Args:
        members: the models as they were planned; None: a plain merge.
        repaired: state-dict key -> tensor.
    """
    checkpoints = met.everyone
    if members is None:
        base = checkpoints.pop() if met.base is not None else None
        return Inputs(tuple(checkpoints), base)
    everyone = members.everyone
    found = [m.loaded.checkpoint for m in everyone]
    transforms = [_transform(m) for m in everyone]
    if None not in found:
        checkpoints = [c for c in found if c is not None]
    first, names = checkpoints[0], members.first.names
    statistics = None
    if members.statistics is not None:
        statistics = [measured_of(first, {n: s[k] for n, k in names.items() if k in s}) for s in members.statistics]
    replaced = {n: repaired[k] for n, k in names.items() if k in repaired and n in first.table}

    def merged(wanted: set[str]) -> dict[str, Tensor]:
        keys = {names[n]: n for n in wanted}
        return {keys[k]: t for k, t in members.merged_tensors(met.skip) if k in keys}

    table = as_stored(first).table
    overrides = {
        n: t.to(torch_dtype(table[n].dtype))
        for n, t in overriding(first, replaced, merged).items()
        if not any(fnmatchcase(n, p) for p in met.skip)
    }
    for i, (checkpoint, transform) in enumerate(zip(checkpoints, transforms, strict=True)):
        if isinstance(checkpoint, Converted):
            checkpoints[i], transforms[i] = as_stored(checkpoint, transform), None
    base = checkpoints.pop() if met.base is not None else None
    return Inputs(tuple(checkpoints), base, tuple(transforms), overrides, statistics)


def _transform(member: Member) -> Transform | None:
    """How the tensors of a member's checkpoint are permuted; None where nothing moves."""
    made = member.plan
    if made is None or not made.moves:
        return None
    return made.carries_files(member.loaded.names)


def write(result: MergeResult, met: Met, inputs: Inputs, asked: MethodRequest, output: Output) -> MergeResult:
    """Write the merge and its record: the result with its files and the report."""
    record = {
        "verdict": result.verdict,
        **met.agreed.record(),
        "plan": result.plan.to_json() if result.plan else None,
        "repaired": result.repaired,
        **({"repair": result.repair} if result.repair else {}),
        **({"comparison": result.comparison} if result.comparison else {}),
        **({"in_place": result.in_place} if result.in_place else {}),
        **({"further_plans": [p.to_json() for p in result.plans[1:]]} if result.plans[1:] else {}),
    }
    tell = met.bench.run.tell

    def progress(done: int, total: int) -> None:
        tell("writing", done, total)

    report = merge_checkpoints(inputs, asked, output, skip=met.skip, record=record, progress=progress)
    notes = [*result.notes, *note(report.overridden)]
    return replace(result, files=list(report.files), notes=notes, report=report.to_json())


def digest_of(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of arrays by name."""
    found = hashlib.sha256()
    for name, array in arrays.items():
        found.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return found.hexdigest()


def moved(carry: Transform) -> Callable[[str, Tensor], Iterator[Tensor]]:
    """What `rewrite` takes: tensors in another order, some rows at a time."""
    from mergeid.basics.on_demand import OnDemand

    def pieces(name: str, value: Tensor) -> Iterator[Tensor]:
        if not value.numel() or not value.dim():
            yield value
            return
        found = carry(name, OnDemand(lambda which: value[which], value.shape, value.dtype))
        step = max(PIECE * len(value) // value.numel(), 1)
        yield from (found[begin : begin + step].contiguous() for begin in range(0, len(value), step))

    return pieces


def reordered(checkpoint: Checkpoint, carry: Transform) -> tuple[Checkpoint, Callable[[str, Tensor], Iterable[Tensor]]]:
    """What `rewrite` takes to write a checkpoint with its tensors in another order."""
    if isinstance(checkpoint, Converted):
        return as_stored(checkpoint, carry), lambda name, value: [value]
    return checkpoint, moved(carry)


def rewrite(
    checkpoint: Checkpoint,
    output: Output,
    transform: Callable[[str, Tensor], Iterable[Tensor]],
    record: Mapping[str, Any],
    run: Run,
    request: Mapping[str, Any] | None = None,
) -> list[Path]:
    """The checkpoint with every tensor transformed (equal shape and dtype), streamed.

    Args:
        transform: gives a tensor's pieces.
        request: what they depend on besides the checkpoint, as JSON: work that was stopped goes on only where it is
            the same.
    """
    from mergeid.io.companions import default_companions
    from mergeid.io.stream import CheckpointWriter
    from mergeid.models.configs import config_files

    writer = CheckpointWriter(
        output,
        like=checkpoint,
        companions=default_companions(checkpoint),
        replace=config_files(checkpoint),
        request={
            "models": [str(path) for path in checkpoint.files],
            "parts of the models (adapters, --dequantise)": origins([checkpoint]),
            "weight files (they were changed)": [[s.st_size, s.st_mtime_ns] for s in map(Path.stat, checkpoint.files)],
            **(request or {}),
        },
    )
    writer.record = {"format": "mergeid.record/1", **record}
    with writer:
        for i, name in enumerate(order := list(writer.order())):
            run.tell("writing", i, len(order))
            if name not in writer:  # else it was written before this was stopped
                writer.write(name, transform(name, checkpoint.tensor(name)))
                checkpoint.release(name)
    return list(writer.paths())
