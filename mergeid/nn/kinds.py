"""The registry of ways to make a layer's weights asymmetric.

A kind is a function from one weight to its `Parts`; biases follow the kind's own rule (`Kind.biases`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Generator, Tensor

from mergeid.errors import MergeidError
from mergeid.nn.effective import Parts


class MakeParts(Protocol):
    """F and D of one parameter.

    Args:
        parameter: its initial value; axis: where its neurons lie.
        sigma: standard deviation of the fixed entries.
        fixed: share (or number) of fixed entries per neuron, where the kind has such.
        generator: the only source of randomness, on the CPU.
    """

    def __call__(self, parameter: Tensor, axis: int, *, sigma: float, fixed: float, generator: Generator) -> Parts:
        """The fixed part and the mask of a parameter whose neurons lie on that axis."""
        ...


@dataclass(frozen=True)
class Kind:
    """A way to fix a part of a parameter."""

    make: MakeParts
    sigma: float
    """Default of `sigma`."""
    biases: bool
    """Whether biases get a fixed part too."""


_KINDS: dict[str, Kind] = {}


def kind(name: str, *, sigma: float, biases: bool) -> Callable[[MakeParts], MakeParts]:
    """Register a kind. Raises ValueError on a duplicate name."""

    def decorate(make: MakeParts) -> MakeParts:
        if name in _KINDS:
            raise ValueError(f"kind {name!r} is registered already")
        _KINDS[name] = Kind(make, sigma, biases)
        return make

    return decorate


def get_kind(name: str) -> Kind:
    """The kind of that name. Raises `MergeidError` for an unknown one."""
    if name not in _KINDS:
        raise MergeidError(f"unknown kind {name!r}; expected one of {', '.join(sorted([*_KINDS, 'sigma']))}")
    return _KINDS[name]
