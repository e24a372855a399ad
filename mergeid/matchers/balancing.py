"""Scales of neurons, balanced: of all networks that differ in positive scales only, the one with the shortest weights.

It is unique (Stock et al. 2019, "Equi-normalization of neural networks"), and found neuron by neuron: the weights that
a scale lengthens become as long as those that it shortens. Two rescaled copies of one network have one balanced form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mergeid.neuron_graph.scaled import Column, Scaled
from mergeid.neuron_graph.turned import Turn

SWEEPS = 400
"""Rounds over all spaces at most."""
STILL = 1e-9
"""Logarithms of factors that count as one."""
EQUAL = 1e-4
"""Difference of two models' lengths, in logarithms, that needs no change."""
COPY = 0.05
"""Balanced, lengths must differ by less than that share of what they did: rescaled copies. Of small networks that lie
near each other, chance alone halves it."""
CLEAR, FAR = 0.35, 0.3
"""Or by less than this share, where their logarithms differed by this much: networks trained apart, then rescaled."""
HOPE = 0.8
"""The share after a few sweeps from which on the rest is not tried."""

States = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True)
class _Lengths:
    """Squared weights, summed over what no scale acts on: tensor -> [axes that scales act on]."""

    squares: dict[str, Tensor]
    kept: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, scaled: Sequence[Scaled], state: Mapping[str, Tensor]) -> _Lengths:
        kept: dict[str, set[int]] = {}
        for one in scaled:
            for column, _ in one.powers:
                kept.setdefault(column.tensors[0], set()).add(column.axis)
        axes = {name: tuple(sorted(found)) for name, found in kept.items()}
        squares = {}
        for name, left in axes.items():
            value = state[name].detach().cpu().double().square()
            gone = [d for d in range(value.dim()) if d not in left]
            squares[name] = value.sum(gone) if gone else value
        return cls(squares, axes)

    def _along(self, column: Column) -> tuple[Tensor, int]:
        name = column.tensors[0]
        return self.squares[name], self.kept[name].index(column.axis)

    def squared(self, one: Scaled, sign: int) -> np.ndarray:
        """[size]: of what a scale lengthens (+1) or shortens."""
        total = np.zeros(one.size)
        for column, power in one.powers:
            if power * sign > 0:
                value, axis = self._along(column)
                along = value.sum([d for d in range(value.dim()) if d != axis]) if value.dim() > 1 else value
                total[column.members] += along.numpy()[column.positions].sum(1)
        return total

    def scale(self, one: Scaled, factors: np.ndarray) -> None:
        """As if these factors were applied."""
        for column, power in one.powers:
            value, axis = self._along(column)
            by = torch.ones(value.shape[axis], dtype=torch.float64)
            for at in column.positions.T:
                by[at] = torch.from_numpy(factors[column.members] ** (2 * power))
            value *= by.reshape([-1 if d == axis else 1 for d in range(value.dim())])

    def profile(self, scaled: Sequence[Scaled]) -> list[np.ndarray]:
        """Logarithms of lengths by scale, [2, neurons] each sorted: the same for permuted networks."""
        found = []
        for one in scaled:
            both = np.stack([self.squared(one, 1), self.squared(one, -1)])
            floor = both.max(1, keepdims=True) * 1e-12 + 1e-300
            found.append(np.sort(np.log(np.maximum(both, floor)) / 2, axis=1))
        return found


def balanced(scaled: Sequence[Scaled], states: States) -> tuple[list[Turn], list[Turn], list[Turn]] | None:
    """What balances A, and its inverse, and what balances B; None where that does not bring the lengths of their
    weights clearly nearer (`COPY`, `CLEAR`): as of models that were never rescaled."""
    if not scaled:
        return None
    a, b = (_Lengths.of(scaled, state) for state in states)
    before = _apart(a.profile(scaled), b.profile(scaled))
    if not before > EQUAL:
        return None
    factors: list[list[np.ndarray]] = [[np.ones(one.size) for one in scaled] for _ in range(2)]
    for sweeps, share in ((4, HOPE), (SWEEPS, CLEAR if before > FAR else COPY)):
        for lengths, found in zip((a, b), factors, strict=True):
            _sweep(scaled, lengths, found, sweeps)
        if not _apart(a.profile(scaled), b.profile(scaled)) < share * before:
            return None
    ours, theirs = ([one.scale(f) for one, f in zip(scaled, found, strict=True)] for found in factors)
    back = [one.scale(1 / f) for one, f in zip(scaled, factors[0], strict=True)]
    return ours, back, theirs


def _sweep(scaled: Sequence[Scaled], lengths: _Lengths, factors: list[np.ndarray], sweeps: int) -> None:
    for _ in range(sweeps):
        largest = 0.0
        for k, one in enumerate(scaled):
            up, down = lengths.squared(one, 1), lengths.squared(one, -1)
            live = (up > 1e-24 * up.max()) & (down > 1e-24 * down.max())
            powers = [abs(p) for _, p in one.powers]
            step = np.where(live, np.where(live, down, 1) / np.where(live, up, 1), 1) ** (0.25 / max(powers))
            lengths.scale(one, step)
            factors[k] = factors[k] * step
            largest = max(largest, float(np.abs(np.log(step)).max()))
        if largest < STILL:
            return


def _apart(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """Root mean square."""
    each = [float(np.square(x - y).mean()) for x, y in zip(ours, theirs, strict=True)]
    return float(np.sqrt(np.mean(each)))
