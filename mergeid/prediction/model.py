"""A predictor that can be read: a few features, each with a weight ≥ 0, and intervals from residuals that it had on
families of networks that it was not fitted on.

The barrier is predicted on the scale t = asinh(y / (2 s)), with s nats (or accuracy points) below which differences
do not matter: linear near 0 and a logarithm far from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from mergeid.errors import MergeidError

FORMAT = "mergeid.predictor/1"
FILE = "coefficients.json"
SAME = 1e-9
"""Divergence of the predictions, and deviation of the layers, up to which two models are one and the same."""
BEYOND = 1.0
"""Widths of the training range that a feature may lie outside it before the answer is "cannot tell"."""


def lift(y: Any, scale: float) -> Any:
    """asinh(y / (2 scale)): odd, about y / (2 scale) near 0, about log(y / scale) far from it."""
    return np.arcsinh(np.asarray(y, float) / (2 * scale))


def lower(t: Any, scale: float) -> Any:
    """The inverse of `lift`."""
    return 2 * scale * np.sinh(np.asarray(t, float))


@dataclass(frozen=True)
class Term:
    """One feature as it enters the sum.

    Attributes:
        feature: its name. scale: it enters as `lift` of it; None: as its logarithm.
        weight: ≥ 0. sign: 1, or -1 for a feature that goes down where the barrier goes up.
        low, high: range of the transformed feature on the pairs fitted.
    """

    feature: str
    scale: float | None
    weight: float = 0.0
    sign: int = 1
    low: float = -math.inf
    high: float = math.inf

    def value(self, features: Mapping[str, float]) -> float:
        x = features[self.feature]
        if not math.isfinite(x):
            return math.nan
        return self.sign * (math.log(max(x, 1e-6)) if self.scale is None else float(lift(x, self.scale)))

    def beyond(self, features: Mapping[str, float]) -> float:
        """How far the feature lies outside the range fitted, in widths of that range."""
        x = self.value(features)
        width = max(self.high - self.low, 1e-9)
        return max(0.0, self.low - x, x - self.high) / width


@dataclass(frozen=True)
class Interval:
    """What is expected of one quantity.

    Attributes:
        expected, low, high: in nats or points, ≥ 0; high may be infinite.
        score: the prediction before it is cut off at 0, on the scale t: what pairs are ranked by.
        within: probability of at most the tolerated loss; None where none was named.
        beyond: how far the pair lies outside what the predictor was fitted on (0: inside).
    """

    expected: float
    low: float
    high: float
    score: float
    within: float | None
    beyond: float

    @property
    def trusted(self) -> bool:
        return self.beyond <= BEYOND

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "trusted": self.trusted}


@dataclass(frozen=True)
class Model:
    """t = intercept + Σ weight · term, and its error's scale = spread₀ + Σ spread · term.

    Attributes:
        unit: "nats" or "points". scale: s of the target.
        terms: of the prediction. spreads: (intercept, terms) of the residuals' scale, floor `least`.
        residuals: normalised residuals on families left out, ascending; shares: their weights, sum 1.
        stretch: ≥ 1, by which the scale is wider than those residuals ask for, because families differ.
    """

    unit: str
    scale: float
    intercept: float
    terms: tuple[Term, ...]
    least: float
    spread: float
    spreads: tuple[Term, ...]
    residuals: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()
    stretch: float = 1.0

    def score(self, features: Mapping[str, float]) -> float:
        return self.intercept + sum(t.weight * t.value(features) for t in self.terms)

    def width(self, features: Mapping[str, float]) -> float:
        """Scale of the error."""
        return max(self.least, self.spread + sum(t.weight * t.value(features) for t in self.spreads))

    def beyond(self, features: Mapping[str, float]) -> float:
        return max((t.beyond(features) for t in self.terms), default=0.0)

    def predict(self, features: Mapping[str, float], *, level: float = 0.9, tolerated: float | None = None) -> Interval:
        """The expected value with an interval that holds it with probability `level` on a new family.

        What lies outside the range that the model was fitted on widens the interval in proportion."""
        if features.get("divergence", 1.0) <= SAME and features.get("deviation", 0.0) <= SAME:
            return Interval(0.0, 0.0, 0.0, -math.inf, None if tolerated is None else 1.0, 0.0)
        score, beyond = self.score(features), self.beyond(features)
        width = self.width(features) * self.stretch * (1 + beyond)
        if not (math.isfinite(score) and math.isfinite(width)):
            return Interval(math.inf, 0.0, math.inf, math.inf, None, math.inf)
        low, high = (score + width * q for q in conformal(self.residuals, self.shares, level))
        within = None
        if tolerated is not None:
            gap = (float(lift(tolerated, self.scale)) - score) / width
            within = share_below(self.residuals, self.shares, gap)
        values = [max(0.0, float(lower(min(t, 40.0), self.scale))) for t in (score, low, high)]
        if high >= 40:
            values[2] = math.inf
        return Interval(values[0], values[1], values[2], score, within, beyond)

    def to_json(self) -> dict[str, Any]:
        return {
            **{k: getattr(self, k) for k in ("unit", "scale", "intercept", "least", "spread", "stretch")},
            "terms": [t.__dict__ for t in self.terms],
            "spreads": [t.__dict__ for t in self.spreads],
            "residuals": [round(r, 4) for r in self.residuals],
            "shares": [round(s, 6) for s in self.shares],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Model:
        plain = {k: data[k] for k in ("unit", "scale", "intercept", "least", "spread", "stretch")}
        return cls(
            **plain,
            terms=tuple(Term(**t) for t in data["terms"]),
            spreads=tuple(Term(**t) for t in data["spreads"]),
            residuals=tuple(data["residuals"]),
            shares=tuple(data["shares"]),
        )


def conformal(residuals: Sequence[float], shares: Sequence[float], level: float) -> tuple[float, float]:
    """Lower and upper quantile of a new normalised residual, (1 ± level) / 2 each.

    A new residual is exchangeable with those seen, so that it takes one place among them: the mass of one of n + 1 is
    put at the far end (Vovk et al. 2005; Lei et al. 2018). Infinite where there are too few."""
    r, w = np.asarray(residuals, float), np.asarray(shares, float)
    if not len(r):
        return -math.inf, math.inf
    effective = 1 / float((w**2).sum())
    up = (1 + level) / 2 * (1 + 1 / effective)
    found = []
    for values, weights, sign in ((r, w, 1), (-r[::-1], w[::-1], -1)):
        total = np.cumsum(weights)
        at = int(np.searchsorted(total, up - 1e-12))
        found.append(sign * (float(values[at]) if at < len(values) else math.inf))
    return found[1], found[0]


def share_below(residuals: Sequence[float], shares: Sequence[float], gap: float) -> float:
    """Probability that a new normalised residual is at most `gap`, never quite 0 or 1."""
    r, w = np.asarray(residuals, float), np.asarray(shares, float)
    if not len(r):
        return 0.5
    effective = 1 / float((w**2).sum())
    below = float(w[r <= gap].sum())
    return (below * effective + 0.5) / (effective + 1)


@dataclass(frozen=True)
class Predictor:
    """The models of all modes: (mode, unit) -> `Model`."""

    version: str
    fitted_on: Mapping[str, Any]
    models: Mapping[tuple[str, str], Model]

    def model(self, mode: str, unit: str) -> Model:
        return self.models[mode, unit]

    def to_json(self) -> dict[str, Any]:
        modes: dict[str, dict[str, Any]] = {}
        for (mode, unit), model in self.models.items():
            modes.setdefault(mode, {})[unit] = model.to_json()
        return {"format": FORMAT, "version": self.version, "fitted_on": dict(self.fitted_on), "modes": modes}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Predictor:
        """Raises `MergeidError` for another format."""
        if data.get("format") != FORMAT:
            raise MergeidError(f"the predictor's coefficients have format {data.get('format')!r}; expected {FORMAT!r}")
        models = {(m, u): Model.from_json(x) for m, units in data["modes"].items() for u, x in units.items()}
        return cls(data["version"], data["fitted_on"], models)


@cache
def shipped() -> Predictor:
    """The predictor that comes with the package."""
    text = files("mergeid.prediction").joinpath(FILE).read_text(encoding="utf-8")
    return Predictor.from_json(json.loads(text))
