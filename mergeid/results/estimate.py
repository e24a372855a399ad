"""What work on two models will take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cost:
    """What one way of merging takes.

    Attributes:
        way: what it is called.
        memory: bytes of memory beside the mapped files.
        disk: bytes written.
        read: bytes read.
        seconds: on one core, imports included; where the disk is slower than the core, it decides.
        note: when this way is taken.
    """

    way: str
    memory: int
    disk: int
    read: int
    seconds: float
    note: str


@dataclass(frozen=True)
class Estimate:
    """Attributes:
    parameters: of one model.
    bytes: of each model's weights.
    free: bytes that are free on the output's disk.
    costs: the ways that a merge of them can go, cheapest first.
    """

    parameters: int
    bytes: tuple[int, ...]
    free: int
    costs: tuple[Cost, ...]

    @property
    def fits(self) -> bool:
        """Whether the result fits on the disk."""
        return all(c.disk <= self.free for c in self.costs)

    def to_json(self) -> dict[str, Any]:
        """Everything."""
        return {
            "parameters": self.parameters,
            "bytes": list(self.bytes),
            "free": self.free,
            "fits": self.fits,
            "ways": [vars(c) for c in self.costs],
        }
