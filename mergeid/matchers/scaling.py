"""Positive scaling of neurons: a symmetry of ReLU-like, linear and gated units (Generalized LMC for Transformers,
Theus et al. 2025; path-SGD's rescaling, Neyshabur et al. 2015).

Neuron i's output times c_i > 0 and whatever reads it divided by c_i leave the function unchanged where the activation
is positively homogeneous. Which spaces have the symmetry, and with which exponent every axis takes part, is tried out:
a candidate counts only if random factors leave the outputs of the model unchanged in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mergeid.basics.state import evaluating, tensors_of
from mergeid.matchers.sides import side
from mergeid.neuron_graph.neuron_graph import AxisMap, NeuronGraph, Space

TOLERANCE = 1e-6
"""Largest change of an output, relative to the largest output, that counts as none: weights are float64, but some norms
compute in float32 whatever they are given."""

Forward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Scaling:
    """A proven symmetry of one space: every axis is multiplied by factor ** exponent, neuron by neuron."""

    space: str
    axes: tuple[tuple[AxisMap, int], ...]


def find_scalings(
    graph: NeuronGraph, model: nn.Module, forward: Forward, batch: Any, *, generator: Generator
) -> list[Scaling]:
    """The scaling symmetries of a model, each proven on `batch`; at most one per space.

    Args:
        model: any number format; a float64 copy is used.
        forward: (model, batch) -> output tensor or a tree of them.
        generator: of the factors that are tried.
    """
    work = evaluating(copy.deepcopy(model)).double()
    found = []
    for space in graph.spaces:
        for axes in _candidates(graph, model, space):
            scaling = Scaling(space.id, axes)
            factors = torch.rand(space.size, generator=generator, dtype=torch.float64).mul(2).sub(1).exp().numpy()
            if changes(work, lambda s, c=scaling, f=factors: scaled(s, c, f), forward, batch) <= TOLERANCE:  # type: ignore[misc]
                found.append(scaling)
                break
    return found


def scaled(state: Mapping[str, Tensor], scaling: Scaling, factors: np.ndarray) -> dict[str, Tensor]:
    """The state dict with every neuron of the space times its factor (> 0, [size])."""
    out = dict(state)
    for axis, exponent in scaling.axes:
        value = out[axis.tensor]
        per_position = np.ones(value.shape[axis.axis])
        per_position[axis.positions] = factors[axis.members, None] ** exponent
        shape = [-1 if d == axis.axis else 1 for d in range(value.dim())]
        out[axis.tensor] = (value * torch.from_numpy(per_position).reshape(shape)).to(value.dtype)
    return out


def match_scaling(scaling: Scaling, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> np.ndarray:
    """The factors [size] that bring B's neurons to A's balance of outgoing and incoming weights; B must be permuted
    already. With exponents e, norms n: Π (n_B cᵉ / n_A)ᵉ = 1 over the axes. Planted factors come back exactly;
    neurons without weights keep factor 1.
    """
    size = 1 + max(int(axis.members.max()) for axis, _ in scaling.axes)
    logs, weight = np.zeros(size), np.zeros(size)
    for axis, exponent in scaling.axes:
        x, y = (_norms(state[axis.tensor], axis) for state in (a, b))
        there = (x > 0) & (y > 0)
        ratio = np.log(np.where(there, x, 1.0) / np.where(there, y, 1.0))
        logs[axis.members] += exponent * ratio
        weight[axis.members] += exponent**2 * there
    return np.exp(logs / np.maximum(weight, 1))


def matched_scalings(
    scalings: list[Scaling], a: Mapping[str, Tensor], b: Mapping[str, Tensor], *, rounds: int = 100
) -> dict[str, Tensor]:
    """B, permuted already, with its neurons in A's scale. Spaces share tensors, so that rounds are made until nothing
    changes by more than 1e-9, or `rounds` at most."""
    state = dict(b)
    for _ in range(rounds):
        largest = 0.0
        for scaling in scalings:
            factors = match_scaling(scaling, a, state)
            largest = max(largest, float(np.abs(factors - 1).max()))
            state = scaled(state, scaling, factors)
        if largest < 1e-9:
            break
    return state


def changes(
    work: nn.Module,
    change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]],
    forward: Forward,
    batch: Any,
) -> float:
    """Largest change of an output when the weights are changed, over the largest output; `work` is float64 and is left
    as it was."""
    from torch.utils._pytree import tree_leaves, tree_map

    before = {k: v.clone() for k, v in tensors_of(work).items()}
    inputs = tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, batch)

    def outputs() -> list[Tensor]:
        with torch.no_grad():
            leaves = tree_leaves(forward(work, inputs))
        return [t.clone() for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]

    plain = outputs()
    try:
        work.load_state_dict(dict(change(before)), strict=False)
        moved = outputs()
    finally:
        work.load_state_dict(before, strict=False)
    worst = 0.0
    for x, y in zip(plain, moved, strict=True):
        difference = float((x - y).abs().max() / x.abs().max().clamp(min=1e-300))
        worst = max(worst, difference if np.isfinite(difference) else np.inf)
    return worst


def _candidates(graph: NeuronGraph, model: nn.Module, space: Space) -> Iterator[tuple[tuple[AxisMap, int], ...]]:
    """Ways in which a space may scale: all that write it up and all that read it down; one of several that write it
    (gates); the first of two that write it against the second where nothing reads it (queries and keys)."""
    writes: dict[str, list[AxisMap]] = {}
    reads: list[AxisMap] = []
    normalised = _before_batchnorm(graph, model, space)
    for axis in space.axes:
        module = axis.tensor.rpartition(".")[0]
        if len(axis.members) < space.size or axis.tensor.endswith(("running_mean", "running_var")):
            continue
        if side(graph, model, axis.tensor, axis.axis) == "in":
            reads.append(axis)
        elif module not in normalised:
            writes.setdefault(module, []).append(axis)
    down = tuple((axis, -1) for axis in reads)
    if writes and reads:
        yield (*((axis, 1) for axes in writes.values() for axis in axes), *down)
    if len(writes) > 1 and reads:
        for axes in writes.values():
            yield (*((axis, 1) for axis in axes), *down)
    if len(writes) == 2 and not reads:
        first, second = writes.values()
        yield (*((axis, 1) for axis in first), *((axis, -1) for axis in second))


def _before_batchnorm(graph: NeuronGraph, model: nn.Module, space: Space) -> set[str]:
    """Layers that write the space and whose scale a BatchNorm takes away: where there is one, all that is no norm."""
    modules = dict.fromkeys(axis.tensor.rpartition(".")[0] for axis in space.axes)
    norms = {m for m in modules if isinstance(model.get_submodule(m), _BatchNorm)}
    return {m for m in modules if m not in norms} if norms else set()


def _norms(value: Tensor, axis: AxisMap) -> np.ndarray:
    front = value.movedim(axis.axis, 0)[torch.from_numpy(axis.positions)]
    answer: np.ndarray = front.reshape(len(axis.members), -1).double().norm(dim=1).numpy()
    return answer
