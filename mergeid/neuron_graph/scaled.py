"""Scales and signs of the neurons of a space, and where they act."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from mergeid.neuron_graph.turned import SCALES, SIGNS, Turn, Turnable, TurnedAxis


@dataclass(frozen=True, eq=False)
class Column:
    """Where a space lies on one axis of one tensor, or of one in several layers.

    Attributes:
        tensors: all names of the tensor.
        positions: int64 [members on this axis, positions of each].
        members: int64 [members on this axis].
        shape: the tensor's.
    """

    tensors: tuple[str, ...]
    axis: int
    positions: np.ndarray
    members: np.ndarray
    shape: tuple[int, ...]

    @property
    def vector(self) -> bool:
        """Whether the tensor is one: a gain, or a bias."""
        return len(self.shape) == 1

    def turned(self, unit: np.ndarray) -> Iterator[TurnedAxis]:
        """Position by position, with the number of the map of each."""
        for name in self.tensors:
            for at in self.positions.T:
                yield TurnedAxis(name, self.axis, at[:, None], unit)


@dataclass(frozen=True, eq=False)
class Scaled:
    """One scale a neuron.

    Attributes:
        size: neurons of the space.
        powers: (where, power) of everything that takes part, powers of both signs.
    """

    space: str
    size: int
    powers: tuple[tuple[Column, int], ...]

    def scale(self, factors: np.ndarray) -> Turn:
        """The change by positive factors [size]."""
        used = sorted({p for _, p in self.powers})
        at = {p: k * self.size for k, p in enumerate(used)}
        axes = tuple(axis for column, p in self.powers for axis in column.turned(column.members + at[p]))
        turnable = Turnable(self.space, SCALES, self.size * len(used), 1, axes)
        return Turn(turnable, np.concatenate([factors**p for p in used])[:, None, None])


@dataclass(frozen=True, eq=False)
class Stream:
    """A space whose neurons may change their signs.

    Attributes:
        flips: what changes sign with a neuron.
        gains: (a gain, what reads it): gains stay, and could be scaled against their readers.
        fixed: vectors that stay as well, and that nothing could be scaled against.
    """

    space: str
    size: int
    flips: tuple[Column, ...]
    gains: tuple[tuple[Column, tuple[Column, ...]], ...]
    fixed: tuple[Column, ...]

    def sign(self, signs: np.ndarray) -> Turn:
        """The change by signs [size]."""
        axes = tuple(axis for column in self.flips for axis in column.turned(column.members))
        return Turn(Turnable(self.space, SIGNS, self.size, 1, axes), signs.astype(float)[:, None, None])


@dataclass(frozen=True)
class Powers:
    """What was found in a model."""

    scaled: tuple[Scaled, ...] = field(default=())
    streams: tuple[Stream, ...] = field(default=())
