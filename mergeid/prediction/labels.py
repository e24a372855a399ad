"""A few labelled examples beside a prediction: one estimate of both.

The labelled examples say x ± e (mean and standard error of the paired excess of losses), the prediction an interval.
The likelihood is normal, and Student's t widens what few examples say. The prior falls off on either side of what was
predicted as fast as its interval says. It is flat beyond an end that is a cut: at 0, as a barrier of 0 says nothing of
what is gained, and at the most that is predicted. What is expected then is the mean of the posterior.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

from mergeid.prediction.model import LEVEL

LEAST_SPREAD = 1e-4
"""Nats: no prediction is surer than that."""
FAR, POINTS = 8.0, 2001
"""Spreads, and points of the grid about each centre, on which the posterior is added up."""


@dataclass(frozen=True)
class Measured:
    """Mean excess of losses over n examples, nats, and its standard error."""

    mean: float
    error: float
    count: int

    def interval(self) -> tuple[float, float]:
        """Of `LEVEL`."""
        reach = float(student.ppf((1 + LEVEL) / 2, max(self.count - 1, 1))) * self.error
        return self.mean - reach, self.mean + reach


@dataclass(frozen=True)
class Corrected:
    """A prediction with its interval, corrected by labels."""

    expected: float
    low: float
    high: float


def corrected(measured: Measured, expected: float, low: float, high: float, *, most: float = math.inf) -> Corrected:
    """Both together, with an interval of `LEVEL`, which `low` and `high` were made for.

    Args:
        expected, low, high: what was predicted, nats; infinite ends: nothing was.
        most: that a prediction ends at, and with a minus where gains are told."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return Corrected(measured.mean, *measured.interval())
    reach = float(norm.ppf((1 + LEVEL) / 2))
    scale = float(student.ppf((1 + LEVEL) / 2, max(measured.count - 1, 1))) / reach
    error = max(measured.error * scale, 1e-9)
    above = math.inf if high >= most else max((high - expected) / reach, LEAST_SPREAD)
    below = math.inf if low in (0.0, -most) else max((expected - low) / reach, LEAST_SPREAD)
    sides = [s for s in (above, below) if s < math.inf]
    between = [_both(measured.mean, error, expected, s) for s in sides]
    reaches = [(measured.mean, error), *((expected, s) for s in sides), *between]
    x = np.unique(np.concatenate([np.linspace(c - FAR * s, c + FAR * s, POINTS) for c, s in reaches]))
    gap = x - expected
    spread = np.where(gap > 0, above, below)
    log = -(((x - measured.mean) / error) ** 2 + (gap / spread) ** 2) / 2
    density = np.exp(log - log.max())
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(x))])
    values = density * x
    mean = float(((values[1:] + values[:-1]) / 2 * np.diff(x)).sum() / mass[-1])
    ends = np.interp([(1 - LEVEL) / 2, (1 + LEVEL) / 2], mass / mass[-1], x)
    return Corrected(mean, float(ends[0]), float(ends[1]))


def _both(one: float, error: float, other: float, spread: float) -> tuple[float, float]:
    """Mean and spread of the product of two normal densities."""
    weights = error**-2, spread**-2
    return (weights[0] * one + weights[1] * other) / sum(weights), sum(weights) ** -0.5
