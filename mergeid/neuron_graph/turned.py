"""Orthogonal maps of the dimensions inside heads, and where they act."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from mergeid.basics.casting import kept_kind
from mergeid.basics.on_demand import OnDemand

FULL, HALVES, SIDE_BY_SIDE = "orthogonal", "rotations of halves", "rotations of neighbours"
SIGNS, SCALES, STREAM = "signs", "positive scales", "orthogonal, gains folded"


@dataclass(frozen=True, eq=False)
class TurnedAxis:
    """Where the dimensions of heads lie on one axis of a tensor.

    Attributes:
        positions: int64 [heads on this axis, dimensions].
        unit: int64 [heads on this axis]: which map acts on each.
    """

    tensor: str
    axis: int
    positions: np.ndarray
    unit: np.ndarray


@dataclass(frozen=True, eq=False)
class Turnable:
    """Heads whose dimensions may be turned.

    Attributes:
        space: id of the space that they lie in.
        kind: the group: `FULL`, `HALVES` or `SIDE_BY_SIDE`.
        units: how many maps there are: heads, or groups of heads that share a key.
        size: dimensions of a head.
    """

    space: str
    kind: str
    units: int
    size: int
    axes: tuple[TurnedAxis, ...]

    def random(self, generator: Generator) -> Turn:
        """Uniform over the group."""
        draws = torch.randn(self.units, self.size, self.size, generator=generator, dtype=torch.float64)
        return Turn(self, np.stack([nearest(self.kind, draw.numpy()) for draw in draws]))


@dataclass(frozen=True, eq=False)
class Turn:
    """Attributes:
    matrices: float64 [units, size, size]: dimensions x of a head become matrix @ x.
    """

    of: Turnable
    matrices: np.ndarray

    def apply(self, tensor: str, value: Tensor) -> Tensor:
        """One tensor under the maps (`value` itself where they do not act on it)."""
        if isinstance(value, OnDemand) and any(axis.tensor == tensor for axis in self.of.axes):
            form = value.whole
            return OnDemand(lambda which: self.apply(tensor, form())[which], value.shape, value.dtype, value.device)
        for axis in self.of.axes:
            if axis.tensor != tensor:
                continue
            wide = value.to(kept_kind(value, torch.float64)).movedim(axis.axis, 0).clone()
            at = torch.from_numpy(axis.positions).to(value.device)
            maps = torch.from_numpy(self.matrices[axis.unit]).to(value.device, wide.dtype)
            wide[at.flatten()] = torch.bmm(maps, wide[at].reshape(*at.shape, -1)).reshape(-1, *wide.shape[1:])
            value = wide.movedim(0, axis.axis).to(value.dtype).contiguous()
        return value

    @property
    def turned(self) -> int:
        """How many of the maps are not the identity."""
        return int((self.matrices != np.eye(self.of.size)).any((1, 2)).sum())

    def to_json(self) -> dict[str, Any]:
        """Everything but the matrices."""
        return {"space": self.of.space, "kind": self.of.kind, "heads": self.of.units, "turned": self.turned}

    def as_map(self) -> dict[str, Any]:
        """The same of a map that does not lie inside heads, with what it changed."""
        return {"space": self.of.space, "kind": self.of.kind, "units": self.of.units, "changed": self.turned}

    def renamed(self, names: Mapping[str, str]) -> Turn:
        """Over other tensor names."""
        axes = tuple(replace(a, tensor=names[a.tensor]) for a in self.of.axes if a.tensor in names)
        return replace(self, of=replace(self.of, axes=axes))


def nearest(kind: str, cross: np.ndarray) -> np.ndarray:
    """The map of the group with the largest inner product with a matrix [size, size] (orthogonal Procrustes)."""
    if kind == FULL:
        u, _, v = np.linalg.svd(cross)
        answer: np.ndarray = u @ v
        return answer
    half = len(cross) // 2
    order = np.arange(len(cross)).reshape((2, half) if kind == HALVES else (half, 2))
    first, second = order if kind == HALVES else order.T
    cosine = cross[first, first] + cross[second, second]
    sine = cross[second, first] - cross[first, second]
    length = np.hypot(cosine, sine)
    cosine, sine = (np.where(length > 0, x / np.where(length > 0, length, 1), o) for x, o in ((cosine, 1), (sine, 0)))
    found = np.zeros_like(cross)
    found[first, first] = found[second, second] = cosine
    found[second, first], found[first, second] = sine, -sine
    return found
