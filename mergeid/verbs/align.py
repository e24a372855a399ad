"""Bring one model into another's order of neurons."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergeid.models.loaded import Example
from mergeid.models.pair import LIMIT, Progress, Source, is_module, output_path, skipped_keys
from mergeid.request.boundary import verb
from mergeid.stages.planned import plan_pair
from mergeid.verbs.merge import MergeResult, check_transport


@verb
def align(
    b: Source,
    to: Source,
    *,
    output: str | os.PathLike[str] | None = None,
    match: str = "auto",
    matcher: str | None = None,
    transport: bool = False,
    data: Any = None,
    arch: str | None = None,
    config: str | None = None,
    force: bool = False,
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
) -> MergeResult:
    """B with its neurons in A's order: the same function, for any other merging tool.

    Args:
        b: the model to permute; to: the model whose order it takes. Others as for `merge`.
        base, certify: as for `plan`.
        outputs: names or globs of those outputs of live modules that count (``"logits"``, ``"0"``); default: all.
        config: "a" (`to`) or "b": whose config B gets where they differ in what the network computes.
        transport: carry B's neurons onto A's by optimal transport, as `merge` does with it: A's shapes, and no longer
            the same function.
        output: default ``./aligned.safetensors``, for folders ``./aligned``.

    Raises `MergeidError` for anything wrong with the input; nothing was written.
    """
    live = is_module(b)
    target = None
    if not (live and output is None):
        default = "aligned" if isinstance(b, (str, os.PathLike)) and os.path.isdir(b) else "aligned.safetensors"
        target = output_path(output or default, [to, b, base, data, arch], force)
    from mergeid.verbs.scramble import rewrite

    if transport:
        check_transport(match, matcher, base)
        return _transported(
            to,
            b,
            target,
            force,
            skip=skip,
            data=data,
            arch=arch,
            config=config,
            seed=seed,
            limit=limit,
            batch_size=batch_size,
            device=device,
            allow_pickle=allow_pickle,
            example_inputs=Example.of(example_inputs, outputs),
            progress=progress,
        )
    planned = plan_pair(
        to,
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
    )
    made, pair = planned.plan, planned.pair
    result = MergeResult(made.verdict, plan=made, notes=list(made.notes))
    if target is None:
        result.state = made.graph.apply_state(made.element, pair.b.state())
        return result
    assert pair.b.checkpoint is not None
    files = made.graph.renamed({k: n for n, k in pair.b.names.items()})
    result.files = rewrite(
        pair.b.checkpoint,
        target,
        lambda n, t: files.apply(made.element, n, t),
        {"align": made.to_json(), **pair.agreed.record()},
        force,
    )
    return result


def _transported(a: Source, b: Source, target: Path | None, force: bool, **how: Any) -> MergeResult:
    """B on A's neurons, in the files that A has."""
    from mergeid.combine.tensor_plan import plan_tensors
    from mergeid.methods.registry import get_method
    from mergeid.methods.settings import MergeSettings
    from mergeid.stages.transport import transported_members
    from mergeid.verbs.scramble import rewrite

    members = transported_members([a, b], MergeSettings.of(get_method("linear"), 2, []), **how)
    one, two = (m.loaded.checkpoint for m in members.models)
    result = MergeResult("transported")
    if target is None:
        result.state = members.models[1].state
        return result
    assert one is not None and two is not None
    plan_tensors(one, two, skip=how["skip"])  # what else differs (heads, labels) is said here
    record = {"align": {"transport": True, "a": one.source, "b": two.source}}
    skipped = {n for n, k in members.first.names.items() if k in skipped_keys(members.first, how["skip"])}
    moved = {n: two.tensor(n) for n in one.table if n in two.table and n not in skipped}
    result.files = rewrite(one, target, lambda n, t: moved.get(n, t).to(t.dtype), record, force)
    return result
