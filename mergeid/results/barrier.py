"""What a barrier measurement found, as plain numbers (no torch), for tables, plots and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORMAT = "mergeid.barrier/1"


@dataclass(frozen=True)
class BarrierResult:
    """Loss and accuracy along the straight line between two networks.

    Attributes:
        lambdas: share of the second network at each point, increasing, 0 and 1 included.
        losses: mean loss (nats) at each point; inf or nan where the network breaks down.
        accuracies: share of right predictions (0 to 1) at each point; None where the task has no accuracy.
        count: scored predictions at each point.
        repair: whether BatchNorm statistics were re-estimated at each point.
        calibration: number of examples that the networks were repaired on.
        dtype: in which the networks were evaluated (``"float32"``), or the mixed precision in its place.
        label: name of the line in tables and plots ("direct", "mergeid").
        solved: whether every network between the ends was solved anew, off the straight line.
        beside: other curves of the same pair, measured with this one.
    """

    lambdas: tuple[float, ...]
    losses: tuple[float, ...]
    accuracies: tuple[float, ...] | None
    count: int
    repair: bool = False
    calibration: int = 0
    dtype: str = "float32"
    label: str = ""
    solved: bool = False
    beside: tuple[BarrierResult, ...] = ()

    def chord(self, index: int) -> float:
        """Loss that the ends' straight line has at a point: (1 − λ) L(0) + λ L(1), exactly L where both ends are L."""
        return _between(self.losses[0], self.losses[-1], self.lambdas[index])

    @property
    def excess(self) -> tuple[float, ...]:
        """Loss above the chord at each point, in nats (negative where the line dips below it)."""
        return tuple(loss - self.chord(index) for index, loss in enumerate(self.losses))

    @property
    def barrier(self) -> float:
        """max over λ of the loss above the chord, in nats, ≥ 0; inf where a network on the way has no finite loss."""
        if not all(map(math.isfinite, self.losses)):
            return math.inf
        return max(0.0, *self.excess)

    @property
    def barrier_lambda(self) -> float | None:
        """Where the barrier is highest; None without one."""
        if not 0 < self.barrier < math.inf:
            return None
        return self.lambdas[max(range(len(self.lambdas)), key=lambda index: self.excess[index])]

    @property
    def barrier_accuracy(self) -> float | None:
        """max over λ of the accuracy below its chord, in percentage points, ≥ 0; None without accuracy."""
        if self.accuracies is None:
            return None
        first, last = self.accuracies[0], self.accuracies[-1]
        drops = (_between(first, last, x) - accuracy for x, accuracy in zip(self.lambdas, self.accuracies, strict=True))
        return 100 * max(0.0, *drops)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready dictionary; losses that are not finite become null."""
        return {
            "format": FORMAT,
            "label": self.label,
            "barrier": _finite(self.barrier),
            "barrier_lambda": self.barrier_lambda,
            "barrier_accuracy_points": self.barrier_accuracy,
            "lambdas": list(self.lambdas),
            "losses": [_finite(loss) for loss in self.losses],
            "accuracies": None if self.accuracies is None else list(self.accuracies),
            "count": self.count,
            "repair": self.repair,
            "calibration": self.calibration,
            "dtype": self.dtype,
            "solved": self.solved,
            "beside": [other.to_json() for other in self.beside],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BarrierResult:
        """The inverse of `to_json`. Raises ValueError for another format."""
        if data.get("format") != FORMAT:
            raise ValueError(f"expected a barrier result of format {FORMAT!r}, got {data.get('format')!r}")
        return cls(
            lambdas=tuple(data["lambdas"]),
            losses=tuple(math.nan if loss is None else loss for loss in data["losses"]),
            accuracies=None if data["accuracies"] is None else tuple(data["accuracies"]),
            count=data["count"],
            repair=data["repair"],
            calibration=data["calibration"],
            dtype=data["dtype"],
            label=data["label"],
            solved=data.get("solved", False),
            beside=tuple(map(cls.from_json, data.get("beside", ()))),
        )


def _between(first: float, last: float, x: float) -> float:
    """Straight line through (0, first) and (1, last), exact at both ends and where they are equal."""
    return first + x * (last - first) if x < 0.5 else last - (1 - x) * (last - first)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
