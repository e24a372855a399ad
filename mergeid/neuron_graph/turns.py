"""Orthogonal maps inside attention heads: symmetries besides the permutations.

Queries and keys of a head meet in inner products, and values go through a linear layer only, so that every orthogonal
map of a head's dimensions leaves the function unchanged if what it meets is mapped alike. Rotary positions leave of
these, for queries and keys, one rotation per frequency: a pair of dimensions, which lie half a head apart or side by
side. Candidates are read off the graph; a map counts only if random ones leave the outputs of the model unchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from mergeid.basics.aliases import first_names, shared_alike
from mergeid.basics.casting import in_precision, kept_kind
from mergeid.basics.nested import dense_tensors, mapped
from mergeid.basics.state import evaluating, forget_derived, tensors_of, uncompiled
from mergeid.neuron_graph.compare import Yardstick, as_real
from mergeid.neuron_graph.neuron_graph import NeuronGraph
from mergeid.neuron_graph.probe import at_least, randomised
from mergeid.neuron_graph.space import AxisMap, Space
from mergeid.neuron_graph.turned import FULL, HALVES, SIDE_BY_SIDE, Turn, Turnable, TurnedAxis
from mergeid.neuron_graph.verify import TOLERANCE


def find_turns(
    graph: NeuronGraph,
    model: nn.Module,
    inputs: Any,
    forward: Callable[[nn.Module, Any], Any],
    *,
    generator: Generator,
) -> list[Turnable]:
    """What may be turned inside the heads of a model, each kind proven in float64 on disturbed weights.

    Args:
        model: not changed; a copy of it runs.
        forward: (model, inputs) -> all outputs that a caller reads, in any nest.
    """
    wanted = list(_candidates(graph))
    if not wanted:
        return []
    probe = shared_alike(in_precision(evaluating(copy.deepcopy(model)), torch.float64), model)
    state = randomised(probe, generator)

    def run(turns: Sequence[Turn] = ()) -> dict[str, Tensor]:
        with torch.no_grad():
            for name, value in tensors_of(probe).items():
                moved = state[name]
                for turn in turns:
                    moved = turn.apply(name, moved)
                value.copy_(moved)
        forget_derived(probe)
        wide = mapped(inputs, lambda t: t.detach().to(kept_kind(t, torch.float64), copy=True))
        with torch.no_grad(), uncompiled(), at_least(torch.float64), torch.random.fork_rng([]):
            torch.manual_seed(0)
            return {name: as_real(t) for name, t in dense_tensors(forward(probe, wide)).items()}

    try:
        yardstick = Yardstick(run())
    except Exception:  # whatever a foreign forward says to other weights, or to float64
        return []
    tolerance, same = TOLERANCE[torch.float64], first_names(tensors_of(probe))

    def holds(turnables: Sequence[Turnable]) -> bool:
        turns = [t.random(generator) for t in turnables]
        moved = run(turns)
        if not yardstick.error(moved) <= tolerance:
            return False
        # on one of the axes alone it must be seen, or nothing was proven
        alone = run([replace(t, of=replace(t.of, axes=_first_place(t.of.axes, same))) for t in turns])
        yardstick.learn(alone)
        return yardstick.error(moved) <= tolerance < yardstick.error(alone)

    found: dict[str, Turnable] = {}
    for kind in (FULL, HALVES, SIDE_BY_SIDE):
        for parts in (1, 2):
            left = [t for k, t in wanted if t.kind == kind and k == parts and t.space not in found]
            taken = left if left and holds(left) else [t for t in left if len(left) > 1 and holds([t])]
            found |= {t.space: t for t in taken}
    return list(found.values())


def _first_place(axes: Sequence[TurnedAxis], same: Mapping[str, str]) -> tuple[TurnedAxis, ...]:
    """The first axis, under all names of its tensor."""
    one = axes[0]
    return tuple(
        a
        for a in axes
        if (same[a.tensor], a.axis) == (same[one.tensor], one.axis) and np.array_equal(a.positions, one.positions)
    )


def candidates(graph: NeuronGraph) -> list[Turnable]:
    """What might be turned, of which a part holds (`find_turns`)."""
    return [turnable for _, turnable in _candidates(graph)]


def _candidates(graph: NeuronGraph) -> Iterator[tuple[int, Turnable]]:
    """Heads by the graph: spaces of blocks that follow something (the dimensions are members), and members that sit on
    several positions of an axis (the dimensions are held in order, of one head or of two: queries and keys)."""
    for space in graph.spaces:
        below = graph.children(space)
        if space.members > 1 and (space.parents or below):
            axes = [a for axis in space.axes for a in _of_members(space, axis)]
            axes += [a for child in below for axis in child.axes for a in _of_children(space, child, axis)]
            if len(axes) > 1 and all(len(a.positions) for a in axes):
                yield 1, Turnable(space.id, FULL, space.blocks, space.members, tuple(axes))
        wide = [(axis, axis.members, axis) for axis in space.axes]
        wide += [
            (axis, child.block_parents[axis.members // child.members, child.parents.index(space.id)], axis)
            for child in below
            for axis in child.axes
        ]
        for parts in (1, 2):
            held = [a for axis, unit, _ in wide for a in _of_positions(axis, unit, parts)]
            sizes = {a.positions.shape[1] for a in held}
            if len(held) > 1 and len(sizes) == 1 and (size := sizes.pop()) > 1 and size % 2 == 0:
                for kind in (HALVES, SIDE_BY_SIDE):
                    yield parts, Turnable(space.id, kind, space.size, size, tuple(held))


def _of_members(space: Space, axis: AxisMap) -> list[TurnedAxis]:
    """Members of a block are the dimensions; a member on several positions is that many heads (fused projections)."""
    if len(axis.members) != space.size:
        return []
    parts = axis.positions.T.reshape(-1, space.blocks, space.members)
    return [TurnedAxis(axis.tensor, axis.axis, p, np.arange(space.blocks)) for p in parts]


def _of_children(space: Space, child: Space, axis: AxisMap) -> list[TurnedAxis]:
    """A child with one block for every (head, dimension), such as the columns of an output projection."""
    column = child.parents.index(space.id)
    if child.members > 1 or len(child.parents) > 2 or len(axis.members) != child.size or axis.positions.shape[1] != 1:
        return []
    inside = child.block_parents[:, column]
    head = child.block_parents[:, 1 - column] if len(child.parents) == 2 else inside // space.members
    order = np.lexsort((inside, head))
    heads = len(order) // space.members
    if len(order) % space.members:
        return []
    dims = inside[order].reshape(heads, space.members)
    unit = dims[:, 0] // space.members
    if not np.array_equal(dims, unit[:, None] * space.members + np.arange(space.members)):
        return []
    return [TurnedAxis(axis.tensor, axis.axis, axis.positions[order, 0].reshape(heads, space.members), unit)]


def _of_positions(axis: AxisMap, unit: np.ndarray, parts: int) -> list[TurnedAxis]:
    positions = axis.positions
    if positions.shape[1] < 2 or positions.shape[1] % parts:
        return []
    return [TurnedAxis(axis.tensor, axis.axis, p, unit) for p in np.split(positions, parts, axis=1)]
