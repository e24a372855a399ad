"""What the structure says of every layer and space of a pair of models: records to stand beside the activations'.

A layer makes a space where its neurons (rows of its weight) are the space's members. Its structural margins are those
of each model's effective weights in the function classes of the fixed part that both share. A space made by several
layers (a residual stream, a gate and its value) is judged on the sum of their costs, and a space in blocks block by
block, the blocks held where they are. All of it presumes that the layers' inputs are matched.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mergeid.errors import MergeidError
from mergeid.evidence.function_class import TOLERANCE, FunctionClasses
from mergeid.evidence.inputs import kind_of, weight_rows
from mergeid.evidence.margin import Margin, margin, swap_costs
from mergeid.evidence.separation import gamma_in, gamma_out
from mergeid.evidence.sources import FixedPart, effective_weight, fixed_part
from mergeid.evidence.stability import stability
from mergeid.evidence.support import Support
from mergeid.neuron_graph.neuron_graph import AxisMap, NeuronGraph, Space

Supports = Mapping[str, Sequence[Support]]
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class ModelRecord:
    """One model's weights in the shared classes of one layer (least over blocks), or of all layers of a space.

    Attributes:
        margin: min_{π≠id} Δ_π, +∞ where nothing else is realizable. identity_optimal: see `Margin`.
        least_swap, median_swap: of T_ij over the pairs of a block; bad_swaps: share of pairs with T_ij ≤ 0.
        radius, by_gap, by_norm: shift radius ε*, and over the eigengap and over ‖Σ‖ (`mergeid.evidence.stability`; the
            better of both forms, but over the gap the one that needs it); None where it was not asked for or none is
            known (behind a BatchNorm), and for spaces: see their layers.
    """

    margin: float
    identity_optimal: bool
    least_swap: float
    median_swap: float
    bad_swaps: float
    by_gap: float | None = None
    by_norm: float | None = None
    radius: float | None = None

    @property
    def identifiable(self) -> bool:
        """Whether the structure alone says that the neurons keep their places."""
        return self.identity_optimal and self.margin > 0


@dataclass(frozen=True)
class LayerRecord:
    """One layer that makes a space.

    Attributes:
        source: of the fixed part, as in `FixedPart`; "nothing" identifies nothing, and then margins are 0.
        neurons: rows on the space; inputs: d. k, coherence, eigengap, explained: of A's support; over the groups of a
            convolution the least k, explained and eigengap, and the largest coherence.
        gamma_out, gamma_in: how far the fixed part separates outputs and inputs; the least over groups.
    """

    layer: str
    space: str
    source: str
    neurons: int
    inputs: int
    k: int
    coherence: float
    eigengap: float
    explained: float
    centred: bool
    gamma_out: float
    gamma_in: float
    a: ModelRecord
    b: ModelRecord

    def to_json(self) -> dict[str, Any]:
        """Infinite numbers as null."""
        answer: dict[str, Any] = _finite(asdict(self))
        return answer


@dataclass(frozen=True)
class SpaceRecord:
    """All layers that make one space: `a` and `b` on the sum of their costs."""

    space: str
    layers: tuple[LayerRecord, ...]
    a: ModelRecord
    b: ModelRecord

    @property
    def identifiable(self) -> bool:
        """Whether both models' structure says that the neurons keep their places."""
        return self.a.identifiable and self.b.identifiable

    def to_json(self) -> dict[str, Any]:
        answer: dict[str, Any] = _finite(asdict(self))
        return answer


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def space_records(
    graph: NeuronGraph,
    model: nn.Module,
    a: State,
    b: State,
    supports: Supports | tuple[Supports, Supports],
    *,
    base: State | None = None,
    before_batchnorm: Collection[str] = (),
    certify: bool = True,
) -> dict[str, SpaceRecord]:
    """Space id -> record, for every space that a layer with a support makes.

    Args:
        model: of the architecture, for the layers' kinds; the graph's tensors are its keys.
        a, b: state dicts under those keys; asymmetric layers with their stored parts.
        supports: of the layers' inputs (`mergeid.evidence.inputs.supports`), of both models or of A for both.
        base: where F and D come from, see `mergeid.evidence.sources.fixed_part`.
        before_batchnorm: layers whose scale is free.
        certify: compute shift radii too, which takes several times as long as all else.

    Raises `MergeidError` where a model does not fit the fixed part.
    """
    both = supports if isinstance(supports, tuple) else (supports, supports)
    out: dict[str, SpaceRecord] = {}
    for space in graph.spaces:
        found = []
        totals: tuple[_Total, _Total] = (_Total(space), _Total(space))
        for name, axis in _makers(graph, space, model, both):
            module = model.get_submodule(name)
            tensor = f"{name}.weight"
            try:
                part = fixed_part(tensor, a, b, base=base)
                layer = _Layer(name, module, part, axis, space, name in before_batchnorm)
                sides = [
                    layer.judge(effective_weight(state, tensor), s[name], total, certify, separate=state is a)
                    for state, s, total in zip((a, b), both, totals, strict=True)
                ]
                found.append(layer.record(both[0][name], sides[0], sides[1]))
            except MergeidError as error:
                raise MergeidError(f"layer {name!r}: {error}") from error
        if found:
            sums = [found[0].a, found[0].b] if totals[0].single else [t.record() for t in totals]
            summed = [replace(s, by_gap=None, by_norm=None, radius=None) for s in sums]
            out[space.id] = SpaceRecord(space.id, tuple(found), summed[0], summed[1])
    return out


def _makers(
    graph: NeuronGraph, space: Space, model: nn.Module, supports: tuple[Supports, Supports]
) -> Iterator[tuple[str, AxisMap]]:
    """Layers whose neurons are members of the space, and where."""
    for axis in space.axes:
        name, dot, last = axis.tensor.rpartition(".")
        if last != "weight" or not dot or any(name not in s for s in supports):
            continue
        kind = kind_of(model.get_submodule(name))
        if axis.axis == (1 if kind in ("transposed linear", "embedding") else 0):
            yield name, axis


class _Total:
    """Costs of a space, summed over its layers, block by block."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.blocks: dict[int, Tensor] = {}
        self.added = 0
        self._partial = False

    @property
    def single(self) -> bool:
        """Whether every block is one layer's, once: then the sum is that layer's own cost."""
        return self.added == len(self.blocks) == self.space.blocks and not self._partial

    def add(self, block: int, members: np.ndarray, cost: Tensor) -> None:
        size = self.space.members
        self.added += 1
        self._partial |= len(members) < size
        if block not in self.blocks:
            self.blocks[block] = torch.zeros(size, size, dtype=torch.float64)
        at = torch.from_numpy(members % size)
        if len(at) == size:
            self.blocks[block] += cost  # members come in order
        else:
            self.blocks[block][at[:, None], at[None]] += cost

    def record(self) -> ModelRecord:
        return _summary([self.blocks[b] for b in sorted(self.blocks)])


def _summary(costs: Sequence[Tensor], radii: Sequence[tuple[float, float, float]] | None = None) -> ModelRecord:
    """The least over blocks, and statistics of all pairs in them."""
    margins: list[Margin] = []
    swaps = []
    for cost in costs:
        swap = swap_costs(cost).fill_diagonal_(torch.inf)
        margins.append(margin(cost, swap))
        swaps.append(swap.numpy().reshape(-1))
    values = np.concatenate(swaps) if len(swaps) > 1 else swaps[0]
    pairs = len(values) - sum(map(len, costs))  # the diagonals are +∞, at the end of the order
    by_gap, by_norm, radius = (min(r[k] for r in radii) for k in range(3)) if radii else (None, None, None)
    return ModelRecord(
        min(m.value for m in margins),
        all(m.identity_optimal for m in margins),
        min(m.least_swap for m in margins),
        float(np.partition(values, pairs // 2)[pairs // 2]),
        float((values <= 0).sum()) / max(pairs, 1),
        by_gap,
        by_norm,
        radius,
    )


class _Layer:
    """One layer on one space."""

    def __init__(
        self, name: str, module: nn.Module, part: FixedPart, axis: AxisMap, space: Space, free_scale: bool
    ) -> None:
        self.name, self.module, self.part, self.axis, self.space = name, module, part, axis, space
        self.free_scale = free_scale
        self.fixed = weight_rows(module, part.fixed)
        self.scaling = None if part.scaling is None else weight_rows(module, part.scaling)
        self.gamma_out, self.gamma_in = inf, inf
        # weights that are rounded to few digits leave their classes by as much
        self.tolerance = max(TOLERANCE, 4 * torch.finfo(part.fixed.dtype).eps)

    def judge(
        self, weight: Tensor, supports: Sequence[Support], total: _Total, certify: bool, separate: bool
    ) -> ModelRecord:
        """Margins of one model's effective weight; its costs are added to the space's. `separate`: take γ too."""
        rows_of = weight_rows(self.module, weight)
        costs: list[Tensor] = []
        radii: list[tuple[float, float, float]] | None = [] if certify and not self.free_scale else None
        positions, members = self.axis.positions, self.axis.members
        blocks = members // self.space.members
        for block in np.unique(blocks):
            inside = blocks == block
            for copy in range(positions.shape[1]):
                rows = positions[inside, copy]
                cost = torch.full((len(rows), len(rows)), torch.inf, dtype=torch.float64)
                for at, classes in self._classes(rows, supports):
                    own = rows_of[torch.from_numpy(rows[at])]
                    cost[torch.from_numpy(at)[:, None], torch.from_numpy(at)[None]] = classes.costs(own)
                    if separate:
                        self.gamma_out = min(self.gamma_out, gamma_out(classes))
                    if radii is not None:
                        radii.append(self._radius(classes, own))
                costs.append(cost)
                total.add(int(block), members[inside], cost)
        if separate:
            for _, classes in self._classes(positions.reshape(-1), supports):
                self.gamma_in = min(self.gamma_in, gamma_in(classes))
        return _summary(costs, radii)

    def _classes(self, rows: np.ndarray, supports: Sequence[Support]) -> Iterator[tuple[np.ndarray, FunctionClasses]]:
        """Rows by group: which of them, and their function classes."""
        group = rows * len(supports) // len(self.fixed)
        for g in np.unique(group):
            at = np.flatnonzero(group == g)
            chosen = torch.from_numpy(rows[at])
            yield (
                at,
                FunctionClasses(
                    self.fixed[chosen],
                    (supports[g],),
                    None if self.scaling is None else self.scaling[chosen],
                    self.part.row_space,
                    self.free_scale,
                    self.tolerance,
                ),
            )

    def _radius(self, classes: FunctionClasses, weights: Tensor) -> tuple[float, float, float]:
        if self.part.source == "nothing":
            return 0.0, 0.0, 0.0
        found = stability(classes, weights)
        return found.by_gap, found.by_norm, found.radius

    def record(self, supports: Sequence[Support], a: ModelRecord, b: ModelRecord) -> LayerRecord:
        return LayerRecord(
            self.name,
            self.space.id,
            self.part.source,
            int(self.axis.positions.size),
            supports[0].d,
            min(s.k for s in supports),
            max(s.coherence for s in supports),
            min(s.eigengap for s in supports),
            min(s.explained for s in supports),
            supports[0].centred,
            self.gamma_out,
            self.gamma_in,
            a,
            b,
        )
