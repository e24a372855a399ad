"""Writes to places that an index or a mask chooses: these places are fixed, the other dimensions agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergeid.neuron_graph.combine import Letter, combine
from mergeid.neuron_graph.layout import FREE, FROZEN, Fine, Layout
from mergeid.neuron_graph.rules import rule
from mergeid.neuron_graph.rules.places import fitting, met

if TYPE_CHECKING:
    from mergeid.neuron_graph.call import Call
    from mergeid.neuron_graph.facts import Labels


def _held(call: Call, layout: Layout, dims: Sequence[int]) -> Layout:
    """Dimensions in which some places are written: also where all were alike, they no longer are."""
    layout = call.freeze_dims(layout, dims)
    at = {d % len(layout.dims) for d in dims} if layout.dims else set()
    return layout.with_dims(
        tuple(Fine(f.size, FROZEN) if f.kind == FREE else f for f in fines) if d in at else fines
        for d, fines in enumerate(layout.dims)
    )


def _written(
    call: Call,
    held: Sequence[int],
    values: Layout,
    letters: Sequence[Letter],
    known: Mapping[int, Labels | None] | None = None,
) -> Layout:
    """`self` with its dimensions `held` fixed and values written over it; a letter of the values that is not a
    dimension of `self` counts places.

    Args:
        known: of those dimensions that are written at places among neurons, these neurons.
    """
    neurons = {d: labels for d, labels in (known or {}).items() if labels is not None}
    own = _held(call, call.layout("self"), [d for d in held if d not in neurons])
    for d, labels in neurons.items():
        own = met(call, own, d, labels)
    n = len(own.dims)
    values = call.freeze_dims(values, [d for d, x in enumerate(letters) if x in held or x not in range(n)])
    names = [x if x not in held else f"place {x}" for x in letters]
    return combine(call.facts, [(own, range(n)), (values, names)], range(n), call.why)


@rule("index_add")
def index_add(call: Call) -> Layout:
    """A sum over the rows of the source, which come in any order as long as the index comes in the same."""
    n = call.out.dim()
    dim = call["dim"] % max(n, 1)
    own, source = _held(call, call.layout("self"), [dim]), call.layout("source")
    row = [f"place {d}" if d == dim else d for d in range(len(source.dims))]
    places = [(call.layout("index"), [f"place {dim}"])] if call["index"].dim() else []
    return combine(call.facts, [(own, range(n)), (source, row), *places], range(n), call.why)


@rule("index_copy", "index_reduce")
def index_copy(call: Call) -> Layout:
    dim = call["dim"] % max(call.out.dim(), 1)
    source, index = call.layout("source"), call.layout("index")
    call.freeze_dims(index, range(len(index.dims)))
    return _written(call, [dim], source, range(len(source.dims)))


@rule("index_fill")
def index_fill(call: Call) -> Layout:
    index = call.layout("index")
    call.freeze_dims(index, range(len(index.dims)))
    return _held(call, call.layout("self"), [call["dim"]])


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def index_put(call: Call) -> Layout:
    indices: list[Tensor | None] = list(call["indices"])
    n = call.out.dim()
    mask, values = indices[0], call.layout("values")
    if len(indices) == 1 and mask is not None and mask.dtype == torch.bool and len(values.dims) <= n - mask.dim():
        # one row of values wherever the mask says so
        chosen = call.layout_of(mask)
        operands = [(call.layout("self"), range(n)), (chosen, range(mask.dim()))]
        return combine(call.facts, [*operands, (values, range(n - len(values.dims), n))], range(n), call.why)
    held: list[int] = []
    known: dict[int, Labels | None] = {}
    dim, shape = 0, 0
    for i in indices:
        masks = i is not None and i.dtype in (torch.bool, torch.uint8)
        width = i.dim() if masks and i is not None else 1
        if i is not None:
            held += range(dim, dim + width)
            shape = max(shape, 1 if masks else i.dim())
            call.freeze_dims(call.layout_of(i), range(i.dim()))
            if not masks and call.out.shape[dim] > 1:
                known[dim] = fitting(call, i, call.out.shape[dim])
        dim += width
    places: list[Letter] = [f"index {k}" for k in range(shape)]
    rest = [d for d in range(n) if d not in held]
    adjacent = held == list(range(held[0], held[-1] + 1))
    before = [d for d in rest if adjacent and d < held[0]]
    letters = [*before, *places, *(d for d in rest if d not in before)]
    k = len(values.dims)
    return _written(call, held, values, letters[len(letters) - k :] if k else [], known)


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(call: Call) -> Layout:
    """Also where the index does not reach the end of a dimension, its positions are fixed."""
    n = call.out.dim()
    shape = call["index"].shape
    dim = call["dim"] % max(n, 1)
    held = [d for d in range(n) if d == dim or shape[d] != call.out.shape[d]]
    index = call.freeze_dims(call.layout("index"), held)
    known = {dim: fitting(call, call["index"], call.out.shape[dim])} if n and call.out.shape[dim] > 1 else None
    out = _written(call, held, index, range(n), known)
    src = call.get("src")
    if not isinstance(src, Tensor):
        return out
    cut = [d for d in range(n) if src.shape[d] != shape[d]]
    source = call.freeze_dims(call.layout_of(src), [*held, *cut])
    names = [x if x not in held else f"place {x}" for x in range(n)]
    return combine(call.facts, [(out, range(n)), (source, names)], range(n), call.why)


@rule("masked_scatter")
def masked_scatter(call: Call) -> Layout:
    """Values are taken in order; whole rows of them where the mask is the same along the row."""
    n, source = call.out.dim(), call.layout("source")
    mask = call.layout("mask")
    row = n > 0 and len(mask.dims) == n and all(f.kind == FREE for f in mask.dims[-1]) and bool(source.dims)
    if not row or source.shape[-1] != call.out.shape[-1] or mask.shape[-1] not in (1, call.out.shape[-1]):
        return _written(call, range(n), source, [f"source {d}" for d in range(len(source.dims))])
    letters = [*(f"source {d}" for d in range(len(source.dims) - 1)), n - 1]
    return _written(call, range(n - 1), source, letters)
