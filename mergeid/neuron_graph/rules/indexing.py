"""Look-ups: embedding tables, index_select, advanced indexing, gather."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mergeid.neuron_graph.combine import combine, elementwise, reduce
from mergeid.neuron_graph.layout import FROZEN, LABELLED, Fine, Layout, take, uniform, view
from mergeid.neuron_graph.rules import rule
from mergeid.neuron_graph.rules.places import looked_up

if TYPE_CHECKING:
    from mergeid.neuron_graph.call import Call


def _frozen(n: int) -> tuple[Fine, ...]:
    return (Fine(n, FROZEN),) if n > 1 else ()


def _constant_values(call: Call, index: Tensor) -> np.ndarray | None:
    """The index as an array if it is the same for every input and in every order of neurons; None otherwise."""
    value, layout = call.recorder.shadows.value(index), call.layout_of(index)
    if value is None or layout.data or layout.groups or call.recorder.places(index) is not None:
        return None
    with _disable_current_modes():
        return value.detach().cpu().numpy()


@rule("embedding")
def embedding(call: Call) -> Layout:
    """[V, D] looked up at data: V is a vocabulary, D are neurons."""
    weight = looked_up(call, call.layout("weight"), 0, call["indices"])
    return _in_place_of(call, weight, [0], [call["indices"]])


@rule("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(call: Call) -> list[Layout | None]:
    """Rows of [V, D] that data choose, summed (or averaged, or the largest) bag by bag."""
    index = call.layout("indices")
    call.freeze_dims(index, range(len(index.dims)))
    weight = looked_up(call, call.layout("weight"), 0, call["indices"])
    if call.get("per_sample_weights") is not None:
        call.freeze_dims(call.layout("per_sample_weights"), [0])
    found = weight.with_dims((_frozen(call.outputs()[0].shape[0]), weight.dims[1]))
    return [replace(found, data=True), *(None for _ in call.outputs()[1:])]


@rule("index_select")
def index_select(call: Call) -> Layout:
    layout = call.layout("self")
    dim = call["dim"] % len(layout.dims)
    index = _constant_values(call, call["index"])
    if index is not None:
        return take(call.facts, layout, dim, index.reshape(-1), call.why)
    layout = looked_up(call, layout, dim, call["index"])
    return _in_place_of(call, layout, [dim], [call["index"]], at_least=1)


@rule("index", "_unsafe_index")
def index(call: Call) -> Layout:
    layout = call.layout("self")
    indices: list[Tensor | None] = list(call["indices"])
    masks = [i for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8)]
    if masks:
        return _masked(call, layout, indices, masks[0])
    dims = [d for d, i in enumerate(indices) if i is not None]
    tensors = [i for i in indices if i is not None]
    shape = torch.broadcast_shapes(*(i.shape for i in tensors))
    adjacent = dims == list(range(dims[0], dims[-1] + 1))
    labelled = any(f.kind == LABELLED for d in dims for f in layout.dims[d])
    values = [_constant_values(call, i) for i in tensors] if labelled and adjacent else [None]
    if labelled and all(v is not None for v in values):
        sizes = [layout.shape[d] for d in dims]
        wide = [np.broadcast_to(v, shape) % n for v, n in zip(values, sizes, strict=True) if v is not None]
        flat = np.ravel_multi_index(wide, sizes).reshape(-1)
        first, last = dims[0], dims[-1] + 1
        full = layout.shape
        layout = view(call.facts, layout, [*full[:first], int(np.prod(sizes)), *full[last:]], call.why)
        layout = take(call.facts, layout, first, flat, call.why)
        return view(call.facts, layout, call.out.shape, call.why)
    for d, i in zip(dims, tensors, strict=True):
        layout = looked_up(call, layout, d, i)
    return _in_place_of(call, layout, dims, tensors, first=not adjacent)


def _in_place_of(
    call: Call,
    layout: Layout,
    dims: Sequence[int],
    indices: Sequence[Tensor],
    *,
    first: bool = False,
    at_least: int = 0,
) -> Layout:
    """The dimensions of indices where those are that they chose from (or before all others).

    Args:
        at_least: how many there are: an index without dimensions has one here.
    """
    count = max(at_least, *(i.dim() for i in indices))
    chosen = elementwise(call.facts, [call.layout_of(i) for i in indices], count, call.why)
    rest = [x for d, x in enumerate(layout.dims) if d not in dims]
    at = 0 if first else dims[0]
    return Layout((*rest[:at], *chosen.dims, *rest[at:]), (*layout.groups, *chosen.groups), layout.data or chosen.data)


def _masked(call: Call, layout: Layout, indices: list[Tensor | None], mask: Tensor) -> Layout:
    """Rows chosen by a mask: its dimensions are fixed and become one."""
    first = next(d for d, i in enumerate(indices) if i is not None)
    alone = sum(i is not None for i in indices) == 1
    held = range(first, first + mask.dim()) if alone else range(len(layout.dims))
    layout = call.freeze_dims(layout, held)
    call.freeze_dims(call.layout_of(mask), range(mask.dim()))
    if not alone:
        return uniform(call.out.shape, FROZEN, True)
    dims = (*layout.dims[:first], _frozen(call.out.shape[first]), *layout.dims[first + mask.dim() :])
    return replace(layout.with_dims(dims), data=True)


@rule("take")
def take_flat(call: Call) -> Layout:
    """Positions of the flattened tensor, which are fixed."""
    layout = call.layout("self")
    call.freeze_dims(layout, range(len(layout.dims)))
    chosen = call.layout("index")
    return replace(chosen, data=chosen.data or layout.data)


@rule("gather")
def gather(call: Call) -> Layout:
    """Positions of one dimension are chosen by data; the others keep their neurons."""
    layout = call.layout("self")
    n = len(layout.dims)
    if not n:
        return layout
    dim = call["dim"] % n
    layout = looked_up(call, layout, dim, call["index"])
    chosen = call.freeze_dims(call.layout("index"), [dim])
    chosen = reduce(call.facts, chosen, [dim], True, call.why)
    cut = [d for d in range(n) if d != dim and layout.shape[d] != call.out.shape[d]]
    layout = call.freeze_dims(layout, cut)
    layout = layout.with_dims(_frozen(call.out.shape[d]) if d in cut else x for d, x in enumerate(layout.dims))
    letters = range(n)
    out = combine(call.facts, [(layout, letters), (chosen, letters)], letters, call.why)
    return out.with_dims(_frozen(call.out.shape[dim]) if d == dim else x for d, x in enumerate(out.dims))


@rule("tril", "triu")
def triangle(call: Call) -> Layout:
    layout = call.layout("self")
    n = len(layout.dims)
    layout = call.freeze_dims(layout, [n - 2, n - 1])
    return layout.with_dims((*layout.dims[:-2], *(_frozen(s) for s in call.out.shape[-2:])))
