"""Checkpoints merged from paths and keywords, without the verb around."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergeid.combine.apply import Inputs, MergeReport
from mergeid.combine.apply import merge_checkpoints as merge
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.opening import open_checkpoint
from mergeid.methods.registry import get_method
from mergeid.methods.settings import MethodRequest
from mergeid.request.request import Output


def merge_checkpoints(
    a: Any,
    b: Any,
    output: str | Path,
    *,
    weights: Any = None,
    normalize: bool | None = None,
    method: str = "linear",
    parameters: Any = None,
    seed: int = 0,
    more: Any = (),
    base: Any = None,
    transform_b: Any = None,
    transforms: Any = (),
    statistics: Any = None,
    overrides: Any = None,
    dtype: str | None = None,
    skip: Any = (),
    force: bool = False,
    shard_size: int | None = None,
    resume: bool = False,
    record: Any = None,
    companions: Any = None,
    progress: Any = None,
) -> MergeReport:
    """`mergeid.combine.apply.merge_checkpoints` of what the keywords say."""
    models = tuple(x if isinstance(x, Checkpoint) else open_checkpoint(x) for x in (a, b, *more))
    origin = base if base is None or isinstance(base, Checkpoint) else open_checkpoint(base)
    rest = len(models) - 2 + (origin is not None)
    moved = (None, transform_b, *(transforms or (None,) * rest))
    inputs = Inputs(models, origin, moved, overrides or {}, statistics)
    asked = MethodRequest(get_method(method), weights, parameters or {}, normalize, seed)
    target = Output(output, dtype, force, shard_size, resume)
    return merge(inputs, asked, target, skip=skip, record=record, companions=companions, progress=progress)
