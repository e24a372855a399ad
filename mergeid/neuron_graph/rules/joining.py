"""Concatenation and stacking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mergeid.neuron_graph.combine import Operand, _refine, combine
from mergeid.neuron_graph.facts import Labels
from mergeid.neuron_graph.layout import FROZEN, LABELLED, Fine, Group, Layout, merged_dim, take
from mergeid.neuron_graph.rules import rule

if TYPE_CHECKING:
    from mergeid.neuron_graph.call import Call


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> Layout:
    tensors = [t for t in call["tensors"] if t.dim() == call.out.dim() and t.numel()] or call["tensors"][:1]
    layouts = [call.layout_of(t) for t in tensors]
    return concatenate(call, layouts, call["dim"] % call.out.dim())


@rule("stack")
def stack(call: Call) -> Layout:
    dim = call["dim"] % call.out.dim()
    layouts = []
    for t in call["tensors"]:
        x = call.layout_of(t)
        layouts.append(x.with_dims((*x.dims[:dim], (), *x.dims[dim:])))
    return concatenate(call, layouts, dim)


@rule("slice_scatter", "select_scatter")
def part_replaced(call: Call) -> Layout:
    """`self` with a run of its positions, or one of them, taken from `src`."""
    own, source = call.layout("self"), call.layout("src")
    n = len(own.dims)
    dim = call["dim"] % n
    size = own.shape[dim]
    if "index" in call.bound:
        where = [call["index"] % size]
        source = source.with_dims((*source.dims[:dim], (), *source.dims[dim:]))
    else:
        where = list(range(size)[slice(call.get("start"), call.get("end"), call["step"])])
    if not where:
        return own
    index = np.arange(size)
    index[where] = size + np.arange(len(where))
    return take(call.facts, concatenate(call, [own, source], dim), dim, index, call.why)


def concatenate(call: Call, layouts: Sequence[Layout], dim: int) -> Layout:
    """Lay the label arrays of the operands one after the other along `dim`.

    Where the dimension itself is not one of neurons (tokens, space), the other dimensions of the operands are the
    same neurons.
    """
    if len(layouts) == 1:
        return layouts[0]
    facts, why = call.facts, call.why
    layouts = [merged_dim(facts, x, dim, why) for x in layouts]
    sizes = [x.shape[dim] for x in layouts]
    on_dim = [x.dims[dim][0].kind if x.dims[dim] else None for x in layouts]
    if (
        LABELLED in on_dim
        and any(k == LABELLED and not x.data for k, x in zip(on_dim, layouts, strict=True))
        and any(k == FROZEN and x.data and x.groups for k, x in zip(on_dim, layouts, strict=True))
    ):
        # learned tokens beside the tokens of the input, which have channels: a dimension of tokens
        layouts = [call.freeze_dims(x, [dim]) if not x.data else x for x in layouts]
        on_dim = [x.dims[dim][0].kind if x.dims[dim] else None for x in layouts]
    n = len(layouts[0].dims)
    others = [d for d in range(n) if d != dim]
    stacked = all(s == 1 for s in sizes) and any(x.groups for x in layouts)
    if LABELLED not in on_dim and not stacked:
        rest = [_without(x, dim) for x in layouts]
        merged = combine(facts, [(x, others) for x in rest], others, why)
        kind = FROZEN
        dims = list(merged.dims)
        dims.insert(dim, (Fine(sum(sizes), kind),))
        return Layout(tuple(dims), merged.groups, any(x.data for x in layouts))

    ops = [Operand(x, tuple(range(n))) for x in layouts]
    for d in others:
        _refine(facts, ops, d, why)
    slots = [_slots(o, dim) for o in ops]
    # the part of the other dimensions that is labelled together with this one
    joint: set[tuple[int, int]] = set()
    if stacked:
        joint = {s for m in slots for f, s in m.items() if f.kind == LABELLED and s[0] != dim}
    changed = True
    while changed:
        changed = False
        for o, m in zip(ops, slots, strict=True):
            for g in o.layout.groups:
                here = {m[f] for f in g.fines}
                if (any(s[0] == dim for s in here) or here & joint) and not here - {(dim, 0)} <= joint:
                    joint |= {s for s in here if s[0] != dim}
                    changed = True
    order = sorted(joint)
    size_of = {s: f.size for m in slots for f, s in m.items()}
    arrays = [
        _joint_labels(call, o, m, dim, size, order, size_of) for o, m, size in zip(ops, slots, sizes, strict=True)
    ]
    for k, array in enumerate(arrays):
        if any(np.isin(array, before).any() for before in arrays[:k]):
            # the same neurons in another role: their second positions are neurons of their own that lie in them
            arrays[k] = facts.fresh(array.shape)
            facts.par(arrays[k], array)
    labels = np.concatenate(arrays, axis=0)

    left = [_restricted(o.layout, m, joint, dim) for o, m in zip(ops, slots, strict=True)]
    merged = combine(facts, [(x, others) for x in left], others, why)
    fine_of = {s: Fine(size_of[s], LABELLED) for s in order}
    cat_fine = Fine(sum(sizes), LABELLED)
    dims = []
    merged_dims = iter(merged.dims)
    for d in range(n):
        if d == dim:
            dims.append((cat_fine,))
            continue
        rest_fines = iter(next(merged_dims))
        count = max(len(o.layout.dims[d]) for o in ops)
        dims.append(tuple(fine_of[d, i] if (d, i) in joint else next(rest_fines) for i in range(count)))
    group = Group(labels, (cat_fine, *(fine_of[s] for s in order)))
    return Layout(tuple(dims), (*merged.groups, group), any(x.data for x in layouts))


def _slots(o: Operand, dim: int) -> dict[Fine, tuple[int, int]]:
    return {f: (d, i) for d, fines in enumerate(o.layout.dims) for i, f in enumerate(fines)}


def _without(layout: Layout, dim: int) -> Layout:
    return Layout(tuple(x for d, x in enumerate(layout.dims) if d != dim), layout.groups, layout.data)


def _joint_labels(
    call: Call,
    o: Operand,
    slots: dict[Fine, tuple[int, int]],
    dim: int,
    size: int,
    order: Sequence[tuple[int, int]],
    size_of: dict[tuple[int, int], int],
) -> Labels:
    """Labels of one operand over (this dimension, joint slots); fresh ones where no group covers exactly that."""
    where = {s: f for f, s in slots.items()}
    wanted = [where[s] for s in ((dim, 0), *order) if s in where]
    shape = (size, *(size_of[s] for s in order))
    present = [s in where for s in ((dim, 0), *order)]
    groups = [g for g in o.layout.groups if set(g.fines) & set(wanted)]
    if (
        len(groups) == 1
        and set(groups[0].fines) == set(wanted)
        and all(p or n == 1 for p, n in zip(present, shape, strict=True))
    ):
        return groups[0].ordered(wanted).reshape(shape)
    labels = call.facts.fresh(shape)
    for g in groups:
        inside = [f for f in wanted if f in g.fines]
        part = [
            where_size if (p and where[s] in g.fines) else 1
            for where_size, p, s in zip(shape, present, ((dim, 0), *order), strict=True)
        ]
        call.facts.par(labels, g.ordered(inside).reshape(part))
    frozen = [f for f in wanted if f.kind == FROZEN]
    if frozen:
        part = [
            n if (p and where[s].kind == FROZEN) else 1
            for n, p, s in zip(shape, present, ((dim, 0), *order), strict=True)
        ]
        call.facts.par(labels, call.facts.frozen(part, call.why))
    return labels


def _restricted(layout: Layout, slots: dict[Fine, tuple[int, int]], joint: set[tuple[int, int]], dim: int) -> Layout:
    """The dimensions and groups that are not part of the joint labels."""
    gone = {f for f, s in slots.items() if s in joint or s[0] == dim}
    groups = tuple(g for g in layout.groups if not set(g.fines) & gone)
    dims = tuple(tuple(f for f in fines if f not in gone) for d, fines in enumerate(layout.dims) if d != dim)
    return Layout(dims, groups, layout.data)
