"""A few labelled examples beside a prediction: one normal estimate of both.

The labelled examples say x ± e (mean and standard error of the paired excess of losses), the prediction an interval.
Both are taken as normal and independent; their precision-weighted mean is what is expected then (the posterior mean
under the prediction as prior). Student's t widens what few examples say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.stats import t as student

LEAST_SPREAD = 1e-4
"""Nats: no prediction is surer than that."""


@dataclass(frozen=True)
class Measured:
    """Mean excess of losses over n examples, nats, and its standard error."""

    mean: float
    error: float
    count: int

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        reach = float(student.ppf((1 + level) / 2, max(self.count - 1, 1))) * self.error
        return self.mean - reach, self.mean + reach


@dataclass(frozen=True)
class Corrected:
    expected: float
    low: float
    high: float


def corrected(measured: Measured, expected: float, low: float, high: float, level: float = 0.9) -> Corrected:
    """Both together, with an interval for the level that `low` and `high` were made for.

    Args:
        expected, low, high: what was predicted, nats; infinite ends: nothing was."""
    reach = float(student.ppf((1 + level) / 2, 1e9))
    scale = float(student.ppf((1 + level) / 2, max(measured.count - 1, 1))) / reach
    own = max(measured.error * scale, 1e-12)
    prior = (high - low) / (2 * reach)
    if not math.isfinite(prior):
        return Corrected(measured.mean, *measured.interval(level))
    weights = 1 / own**2, 1 / max(prior, LEAST_SPREAD) ** 2
    mean = (weights[0] * measured.mean + weights[1] * expected) / sum(weights)
    spread = sum(weights) ** -0.5
    return Corrected(mean, mean - reach * spread, mean + reach * spread)
