"""B's heads turned onto A's, dimension by dimension: orthogonal Procrustes on the weights (Schönemann 1966).

Which head is which cannot be told from single dimensions where these may be turned: heads are paired by what turning
reaches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mergeid.basics.on_demand import OnDemand
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph, Space
from mergeid.neuron_graph.turned import Turn, Turnable, TurnedAxis, nearest

APART = 0.7
"""Where every head's inner product with A's is that share of what turning it could reach, or more, B is taken to have
A's origin, and nothing is turned."""
SAME = 1 - 1e-4
"""A head that reaches that share stays as it lies."""
States = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]


def matched_turns(
    turnables: Sequence[Turnable], a: Mapping[str, Tensor], b: Mapping[str, Tensor], *, least: float = APART
) -> tuple[Turn, ...]:
    """The maps that bring B, its neurons in A's order already, nearest to A; none where all heads lie well.

    They maximise Σ ⟨A, Q B⟩ over the tensors of every head, each tensor divided by its root mean square.

    Args:
        least: where every head has that share of what turning could reach, nothing is turned. B is asked in A's order,
            so that a scrambled copy is answered as B itself.
    """
    found, lowest = [], 1.0
    for turnable in turnables:
        cross = _cross(turnable, turnable.axes, (a, b))
        matrices = np.stack([nearest(turnable.kind, c) for c in cross])
        reached, before = (matrices * cross).sum((1, 2)), np.trace(cross, axis1=1, axis2=2)
        share = np.where(reached > 0, before / np.where(reached > 0, reached, 1), 1)
        lowest = min(lowest, float(share.min()))
        matrices[share >= SAME] = np.eye(turnable.size)
        if (share < SAME).any():
            found.append(Turn(turnable, matrices))
    return tuple(found) if lowest < least else ()


def paired_heads(graph: NeuronGraph, turnables: Sequence[Turnable], element: Element, states: States) -> Element:
    """The element with the heads of B paired anew, family by family of spaces, wherever turning then reaches more.

    Args:
        states: A's, and B's as it lies.
    """
    families: dict[str, list[Turnable]] = {}
    for turnable in turnables:
        space = graph.by_id[turnable.space]
        families.setdefault(space.parents[0] if space.parents else space.id, []).append(turnable)
    for head, group in families.items():
        below = _below(graph, head)
        inside = {head, *(s.id for s in below)}
        own = graph.by_id[head]
        if own.parents or own.blocks > 1 or any(not inside.issuperset(s.parents) for s in below):
            continue
        new = _paired(graph, group, element, states, below)
        if _reached(graph, group, new, states) > _reached(graph, group, element, states) * (2 - SAME):
            element = new
    return element


def _paired(
    graph: NeuronGraph, group: Sequence[Turnable], element: Element, states: States, below: Sequence[Space]
) -> Element:
    """The heads by what their keys and values reach, then the queries that share a key by where they lie, turned."""
    head = graph.by_id[group[0].space]
    head = graph.by_id[head.parents[0]] if head.parents else head
    a, b = states
    plain = {**element, **{s.id: np.arange(s.size) for s in (head, *below)}}
    lying = heads_of(graph, plain, group, b)
    reach = np.sum([_reach(t, (a, lying)) for t in group], axis=0)
    new = {**plain, head.id: linear_sum_assignment(reach, maximize=True)[1]}
    for space in below:
        new[space.id] = graph.follow(space, new)
    turned = heads_of(graph, new, group, b)
    for t in group:
        cross = _cross(t, _direct(t), (a, turned))
        turn = Turn(t, np.stack([nearest(t.kind, c) for c in cross]))
        turned = {k: turn.apply(k, v) for k, v in turned.items()}
    for space in below:
        if space.members > 1 and space.parents == (head.id,) and not any(t.space == space.id for t in group):
            new[space.id] = _inside(space, group, (a, turned), new[space.id])
        elif space.parents != (head.id,):
            new[space.id] = graph.follow(space, new)
    return new


def _inside(space: Space, group: Sequence[Turnable], states: States, order: np.ndarray) -> np.ndarray:
    """Heads that share a unit, paired by their inner products."""
    score = np.zeros((space.size, space.size))
    for t in group:
        for axis in t.axes:
            if len(axis.positions) == space.size and len(axis.positions) > t.units:
                x, y, scale = _rows(axis, states)
                score += (x.flatten(1) @ y.flatten(1).T).numpy() * scale
    out: np.ndarray = order.copy()
    for block in range(space.blocks):
        at = slice(block * space.members, (block + 1) * space.members)
        out[at] = order[at][linear_sum_assignment(score[at, at], maximize=True)[1]]
    return out


def _reach(turnable: Turnable, states: States) -> np.ndarray:
    """[units, units] what turning one of B's units onto one of A's reaches, by the axes with one head a unit."""
    total = np.zeros((turnable.units, turnable.units, turnable.size, turnable.size))
    for axis in _direct(turnable):
        x, y, scale = _rows(axis, states)
        total += torch.einsum("iax,jbx->ijab", x, y).numpy() * scale
    return np.array([[float((nearest(turnable.kind, c) * c).sum()) for c in row] for row in total])


def _reached(graph: NeuronGraph, group: Sequence[Turnable], element: Element, states: States) -> float:
    a, b = states
    moved = heads_of(graph, element, group, b)
    crosses = [(t.kind, c) for t in group for c in _cross(t, t.axes, (a, moved))]
    return sum(float((nearest(kind, c) * c).sum()) for kind, c in crosses)


def _direct(turnable: Turnable) -> list[TurnedAxis]:
    return [axis for axis in turnable.axes if np.array_equal(axis.unit, np.arange(turnable.units))]


def _cross(turnable: Turnable, axes: Sequence[TurnedAxis], states: States) -> np.ndarray:
    """[units, size, size] inner products of A's and B's dimensions."""
    cross = np.zeros((turnable.units, turnable.size, turnable.size))
    for axis in axes:
        x, y, scale = _rows(axis, states)
        np.add.at(cross, axis.unit, torch.bmm(x, y.mT).numpy() * scale)
    return cross


def _rows(axis: TurnedAxis, states: States) -> tuple[Tensor, Tensor, float]:
    """[heads, dimensions, …] of both models, float64, and what their products are multiplied by."""
    at = torch.from_numpy(axis.positions)
    found = (s[axis.tensor].detach() for s in states)
    whole = (t.whole() if isinstance(t, OnDemand) else t for t in found)
    both = (t.cpu().double().movedim(axis.axis, 0) for t in whole)
    x, y = (rows[at].reshape(*at.shape, -1) for rows in both)
    size = float((x.square().mean() * y.square().mean()).sqrt())
    return x, y, 1 / size if size > 0 else 0.0


def heads_of(
    graph: NeuronGraph, element: Element, group: Sequence[Turnable], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors that these heads lie on, in another order."""
    names = dict.fromkeys(axis.tensor for t in group for axis in t.axes)
    return {name: graph.apply(element, name, state[name]) for name in names}


def _below(graph: NeuronGraph, head: str) -> list[Space]:
    """All spaces that follow this one, parents first."""
    inside = {head}
    out = []
    for space in graph.spaces:
        if inside & set(space.parents):
            inside.add(space.id)
            out.append(space)
    return out
