"""Spaces of interchangeable neurons, and where they live on tensors and activations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

Element = dict[str, np.ndarray]
"""A group element: space id -> int array [size]; the neuron at position i is taken from position ``perm[i]``."""


@dataclass(frozen=True, eq=False)
class AxisMap:
    """Where a space lives on one axis of one tensor.

    Attributes:
        index: int64 [length of the axis], flat member (block · members per block + member) or -1. A member may sit on
            several positions; they move together, in order.
    """

    tensor: str
    axis: int
    index: np.ndarray

    @cached_property
    def positions(self) -> np.ndarray:
        """int64 [members on this axis, positions of each], rows in order of `members`."""
        at = np.flatnonzero(self.index >= 0)
        at = at[np.argsort(self.index[at], kind="stable")]
        return at.reshape(len(self.members), -1)

    @cached_property
    def members(self) -> np.ndarray:
        """Flat members that sit on this axis, ascending."""
        return np.unique(self.index[self.index >= 0])


@dataclass(frozen=True, eq=False)
class Space:
    """Interchangeable neurons in blocks: free inside a block, blocks follow their parents.

    Attributes:
        size: number of neurons = blocks · members per block.
        parents: ids of the spaces that the blocks lie in; without parents, blocks stay where they are.
        block_parents: int64 [blocks, len(parents)]: flat member of every parent that the block lies in. With one
            parent, block b lies in its member b.
    """

    id: str
    label: str
    size: int
    blocks: int
    parents: tuple[str, ...]
    block_parents: np.ndarray
    axes: tuple[AxisMap, ...]

    def __repr__(self) -> str:
        return f"Space({self.id!r}, {self.label!r}, size={self.size}, group={self.group!r}, axes={len(self.axes)})"

    @property
    def members(self) -> int:
        """Members per block."""
        return self.size // self.blocks

    @property
    def group(self) -> str:
        """The symmetry group in words, for tables."""
        inner = f"S({self.members})" if self.members > 1 else ""
        if not self.parents:
            return inner if self.blocks == 1 else f"{self.blocks} × {inner}"
        inside = f"in {', '.join(self.parents)}"
        return f"{self.blocks} × {inner} {inside}" if inner else f"follows {', '.join(self.parents)}"


@dataclass(frozen=True)
class TapMap:
    """Where the activations of a space can be read: dimensions `dims` of the input or output of a module's call.

    Attributes:
        index: int64 [product of those dimensions], flat member or -1.
    """

    module: str
    kind: str
    call: int
    ndim: int
    dims: tuple[int, ...]
    index: np.ndarray
