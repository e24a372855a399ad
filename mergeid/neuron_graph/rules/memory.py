"""Operations that read the memory of a tensor in another shape, by strides (as_strided, resize_)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from mergeid.neuron_graph.layout import FREE, FROZEN, Fine, Layout, take, uniform, view
from mergeid.neuron_graph.rules import rule

if TYPE_CHECKING:
    from torch import Tensor

    from mergeid.neuron_graph.call import Call


@rule("as_strided", "as_strided_copy")
def as_strided(call: Call) -> Layout:
    start = call.get("storage_offset")
    return _read(call, call["size"], call["stride"], call["self"].storage_offset() if start is None else start)


@rule("resize", "resize_as")
def resize(call: Call) -> Layout:
    return _read(call, call.out.shape, call.out.stride(), call.out.storage_offset())


def _read(call: Call, shape: Sequence[int], strides: Sequence[int], start: int) -> Layout:
    """What lies in memory from `start` on; windows over the last dimensions (spectrograms), and whatever else is no
    transposition, slice or expansion, are frozen."""
    own = call["self"]
    root = call.recorder.root(own)
    found = _cut(call, root, shape, strides, start)
    if found is not None:
        return found
    layout = call.layout_of(own)
    old, kept, n = layout.shape, 0, len(layout.dims)
    while kept < min(n, len(shape)) - 1 and (old[kept], own.stride(kept)) == (shape[kept], strides[kept]):
        kept += 1
    dense = all(own.stride(d) == prod(old[d + 1 :]) for d in range(kept, n))
    span = sum((size - 1) * stride for size, stride in zip(shape[kept:], strides[kept:], strict=True))
    if start != own.storage_offset() or not dense or span >= prod(old[kept:]):
        kept = 0
        call.facts.freeze(call.layout_of(root).all_labels, call.why)
    layout = call.freeze_dims(layout, range(kept, n))
    return layout.with_dims((*layout.dims[:kept], *uniform(shape[kept:], FROZEN).dims))


def _cut(call: Call, root: Tensor, shape: Sequence[int], strides: Sequence[int], start: int) -> Layout | None:
    """The layout where every stride divides the next larger one: then the strides cut the memory of `root` into
    dimensions, of which parts are taken. None for any others, and where `root` has gaps."""
    layout = call.layout_of(root)
    order = sorted((d for d in range(root.dim()) if root.shape[d] > 1), key=root.stride, reverse=True)
    total = prod(root.shape)
    dense = all(root.stride(d) == prod(root.shape[e] for e in order[k + 1 :]) for k, d in enumerate(order))
    start -= int(root.storage_offset())
    if not dense or not total or 0 in shape or not 0 <= start < total:
        return None
    moving = [(s, n, d) for d, (s, n) in enumerate(zip(strides, shape, strict=True)) if s and n > 1]
    moves = sorted(moving, reverse=True)
    steps = [s for s, _, _ in moves]
    if not steps or steps[-1] != 1:
        steps.append(1)
    if any(large % small or large == small for large, small in pairwise(steps)):
        return None
    counts = [n for _, n, _ in moves] + [1] * (len(steps) - len(moves))
    firsts = [start // steps[0], *(start % large // small for large, small in pairwise(steps))]
    sizes = [total // steps[0], *(large // small for large, small in pairwise(steps))]
    if any(first + count > size for first, count, size in zip(firsts, counts, sizes, strict=True)):
        return None
    layout = layout.with_dims(layout.dims[d] for d in order)
    if total % steps[0]:
        used = np.arange(firsts[0] * steps[0], (firsts[0] + counts[0]) * steps[0])
        layout = take(call.facts, view(call.facts, layout, [total], call.why), 0, used, call.why)
        firsts[0], sizes[0] = 0, counts[0]
    layout = view(call.facts, layout, sizes, call.why)
    for d, (first, count, size) in enumerate(zip(firsts, counts, sizes, strict=True)):
        if count < size:
            layout = take(call.facts, layout, d, np.arange(first, first + count), call.why)
    at = {d: layout.dims[k] for k, (_, _, d) in enumerate(moves)}
    return layout.with_dims(at.get(d, (Fine(n, FREE),) if n > 1 else ()) for d, n in enumerate(shape))
