"""Bring one model into another's order of neurons."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from mergeid.merging import MergeResult
from mergeid.pair import LIMIT, Progress, Source, is_module, output_path
from mergeid.planned import plan_pair


def align(
    b: Source,
    to: Source,
    *,
    output: str | os.PathLike[str] | None = None,
    match: str = "auto",
    matcher: str | None = None,
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
    base: Source | None = None,
    certify: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """B with its neurons in A's order: the same function, for any other merging tool.

    Args:
        b: the model to permute; to: the model whose order it takes. Others as for `merge`.
        base, certify: as for `plan`.
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
        matcher=matcher,
        seed=seed,
        limit=limit,
        batch_size=batch_size,
        device=device,
        skip=skip,
        allow_pickle=allow_pickle,
        example_inputs=example_inputs,
        base=base,
        certify=certify,
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
