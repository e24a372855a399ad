"""A predictor that can be read: a few features, each with a weight ≥ 0, and intervals from residuals that it had on
families of networks that it was not fitted on.

The barrier is predicted on the scale t = asinh(y / (2 s)), with s nats (or accuracy points) below which differences
do not matter: linear near 0 and a logarithm far from it. What a merge gains, y < 0, counts for less on it, or not at
all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from mergeid.errors import MergeidError
from mergeid.prediction.chance import Chance
from mergeid.prediction.worth import Shares

FORMAT = "mergeid.predictor/4"
WAYS = ("direct", "matched", "repaired", "solved", "leaning")
"""Of merging a pair; solved merges that lean to one model are only told of after a trial."""
FILE = "coefficients.json"
SAME = 1e-9
"""Divergence of the predictions, and deviation of the layers, up to which two models are one and the same."""
BEYOND = 0.5
"""Widths of the training range that a feature may lie outside it, and share of the largest distance from its middle
that all together may lie beyond it, before the answer is "cannot tell"."""
ALL, FROM_ZERO = "all", ", from 0"
"""Names of pools: of all pairs; behind another name, of those of its pairs whose interval begins at 0."""
SHARED_START, APART_START = "shared", "apart"
"""Kinds of start, and names of their pools."""
SHARED = 0.5
"""Cosine of two models' weights from which they are taken to come from one start."""
LEVEL = 0.9
"""Coverage of intervals."""
MOST_POINTS = 100.0
FAR = 40.0
"""On the scale t: beyond all that there is to lose or to gain."""
PLAIN = ("unit", "scale", "intercept", "least", "spread", "collapsed", "gains")
"""Of a model, as they lie in the file."""


def lift(y: Any, scale: float, gains: float = 1.0) -> Any:
    """asinh(y / (2 scale)): odd, about y / (2 scale) near 0, about log(y / scale) far from it; `gains` times as much
    below 0."""
    t = np.arcsinh(np.asarray(y, float) / (2 * scale))
    return np.where(t < 0, gains * t, t)


def lower(t: Any, scale: float, gains: float = 1.0) -> Any:
    """The inverse of `lift`; nothing below 0 for gains that do not count."""
    t = np.asarray(t, float)
    below = t / gains if gains else np.zeros_like(t)
    return 2 * scale * np.sinh(np.where(t < 0, below, t))


@dataclass(frozen=True)
class Term:
    """One feature as it enters the sum.

    Attributes:
        feature: its name. scale: it enters as `lift` of it; None: as its logarithm.
        weight: ≥ 0. sign: 1, or -1 for a feature that goes down where the barrier goes up.
        low, high: range of the transformed feature on the pairs fitted.
        capped: it counts at most as much as there is left to lose: what a uniform guess loses beyond the models.
    """

    feature: str
    scale: float | None
    weight: float = 0.0
    sign: int = 1
    low: float = -math.inf
    high: float = math.inf
    capped: bool = False

    def value(self, features: Mapping[str, float]) -> float:
        x = features[self.feature]
        if self.capped:
            x = min(x, max(features["uniform"] - features["own_entropy"], 0.0))
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
        expected, low, high: in nats or points, low ≤ expected ≤ high ≤ the most that there can be to lose; not below 0,
            or where gains are told (`Model.gains`) not below the same with a minus.
        score: the prediction before it is cut off, on the scale t: what pairs are ranked by.
        within: probability of at most the tolerated loss; None where none was named.
        beyond: how far the pair lies outside what the predictor was fitted on (0: inside).
        collapsed: one of the models makes the same prediction for every input, so that nothing can be told.
        open: the interval ends at what a uniform guess loses, where predictions end. A merge that is sure of wrong
            answers may lose more.
    """

    expected: float
    low: float
    high: float
    score: float
    within: float | None
    beyond: float
    collapsed: bool = False
    open: bool = False

    def holds(self, value: float, rounding: float = 0.0) -> bool:
        """Whether a measured value lies in the interval."""
        return self.low - rounding <= value and (self.open or value <= self.high + rounding)

    @property
    def trusted(self) -> bool:
        return self.beyond <= BEYOND and not self.collapsed

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "trusted": self.trusted}


@dataclass(frozen=True)
class Pool:
    """Normalised residuals on families left out, of pairs of one kind of start.

    Attributes:
        residuals: ascending; shares: their weights, sum 1.
        stretch: by which the interval is wider than those residuals ask for, because families differ.
    """

    residuals: tuple[float, ...]
    shares: tuple[float, ...]
    stretch: float = 1.0

    def ends(self, level: float) -> tuple[float, float]:
        low, high = conformal(self.residuals, self.shares, level)
        return self.stretch * low, self.stretch * high

    def end(self, level: float) -> float:
        """Of an interval that has only an upper one."""
        return self.stretch * conformal_above(self.residuals, self.shares, level)

    def to_json(self) -> dict[str, Any]:
        return {
            "stretch": self.stretch,
            "residuals": [round(r, 4) for r in self.residuals],
            "shares": [round(s, 6) for s in self.shares],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Pool:
        return cls(tuple(data["residuals"]), tuple(data["shares"]), data["stretch"])


def start(features: Mapping[str, float]) -> str:
    """Kind of start: `SHARED_START` where the weights say that both models come from one, else `APART_START`."""
    apart = min(abs(features.get("hash_distance", 2.0)), 2.0)
    return SHARED_START if features.get("cosine", 1 - apart**2 / 2) >= SHARED else APART_START


@dataclass(frozen=True)
class Reach:
    """Where the pairs fitted lie, all terms together.

    Attributes:
        centre: means of the terms' values. precision: inverse covariance, rows. most: largest Mahalanobis distance.
    """

    centre: tuple[float, ...] = ()
    precision: tuple[tuple[float, ...], ...] = ()
    most: float = math.inf

    def beyond(self, values: Sequence[float]) -> float:
        """Distance over the largest fitted, less 1, at least 0."""
        if not self.centre:
            return 0.0
        gap = np.asarray(values, float) - np.asarray(self.centre)
        square = float(gap @ np.asarray(self.precision, float) @ gap)
        return max(0.0, math.sqrt(max(square, 0.0)) / self.most - 1) if math.isfinite(square) else math.inf

    def to_json(self) -> dict[str, Any]:
        return {"centre": list(self.centre), "precision": [list(r) for r in self.precision], "most": self.most}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Reach:
        return cls(tuple(data["centre"]), tuple(tuple(r) for r in data["precision"]), data["most"])


@dataclass(frozen=True)
class Model:
    """t = intercept + Σ weight · term, and its error's scale = spread₀ + Σ spread · term.

    Attributes:
        unit: "nats" or "points". scale: s of the target.
        terms: of the prediction. spreads: (intercept, terms) of the residuals' scale, floor `least`.
        pools: residuals of all pairs ("all") and of those of one kind of start (`start`); of the pairs whose interval
            begins at 0 again by themselves (`FROM_ZERO`).
        chance: of staying within a loss. reach: of the pairs fitted.
        collapsed: least that a model has to tell of its inputs (`mergeid.prediction.features.EndSums`).
        gains: how much what is gained counts beside what is lost, on the scale t; 0: it is not told.
    """

    unit: str
    scale: float
    intercept: float
    terms: tuple[Term, ...]
    least: float
    spread: float
    spreads: tuple[Term, ...]
    pools: Mapping[str, Pool] = field(default_factory=dict)
    chance: Chance = field(default_factory=Chance)
    reach: Reach = Reach()
    collapsed: float = 0.0
    gains: float = 0.0

    def values(self, features: Mapping[str, float]) -> list[float]:
        return [t.value(features) for t in self.terms]

    def lifted(self, y: Any) -> Any:
        """Losses (or points) on the scale t."""
        return lift(y, self.scale, self.gains)

    def score(self, features: Mapping[str, float]) -> float:
        return self.intercept + sum(t.weight * t.value(features) for t in self.terms)

    def width(self, features: Mapping[str, float]) -> float:
        """Scale of the error."""
        return max(self.least, self.spread + sum(t.weight * t.value(features) for t in self.spreads))

    def beyond(self, features: Mapping[str, float]) -> float:
        """By its farthest term, or by all together."""
        return max((self.reach.beyond(self.values(features)), *(t.beyond(features) for t in self.terms)), default=0.0)

    def most(self, features: Mapping[str, float]) -> float:
        """What there is to lose: all points, or the nats that a uniform guess loses; beyond it nothing is told."""
        return MOST_POINTS if self.unit == "points" else max(features.get("uniform", math.inf), 0.0)

    def predict(
        self, features: Mapping[str, float], *, level: float = LEVEL, tolerated: float | None = None
    ) -> Interval:
        """The expected value with an interval that holds it with probability `level` on a new family.

        What lies outside the range that the model was fitted on widens the interval in proportion. Nothing leaves
        [0, `most`], or [-`most`, `most`] where gains are told."""
        if features.get("divergence", 1.0) <= SAME and features.get("deviation", 0.0) <= SAME:
            return Interval(0.0, 0.0, 0.0, -math.inf, None if tolerated is None else 1.0, 0.0)
        most, collapsed = self.most(features), features.get("told", 1.0) < self.collapsed
        score, beyond = self.score(features), self.beyond(features)
        width = self.width(features) * (1 + beyond)
        if not (math.isfinite(score) and math.isfinite(width)):
            return Interval(
                most, self._cut(-math.inf, most), most, math.inf, None, math.inf, collapsed, self.unit == "nats"
            )
        ends = (score + width * q for q in self.ends(start(features), score, width, level))
        expected, low, high = (self._cut(t, most) for t in (score, *ends))
        within = None
        if tolerated is not None:
            within = 1.0 if tolerated >= most else self.chance(float(self.lifted(tolerated)), score)
        high = max(high, expected)
        ends_there = self.unit == "nats" and high >= most
        return Interval(expected, min(low, expected), high, score, within, beyond, collapsed, ends_there)

    def ends(self, kind: str, score: float, width: float, level: float) -> tuple[float, float]:
        """The interval's, in widths from the score.

        Nothing is less than 0. An interval that begins there misses nothing below, so that its upper end may miss all
        that the interval may miss, and not half of it."""
        kind = kind if kind in self.pools else ALL
        low, high = self.pools.get(kind, NO_POOL).ends(level)
        if self.gains or score + width * low > 0:
            return low, high
        above = self.pools.get(kind + FROM_ZERO)
        return low, high if above is None else above.end(level)

    def _cut(self, t: float, most: float) -> float:
        least = -most if self.gains else 0.0
        if abs(t) >= FAR:
            return most if t > 0 else least
        return max(min(float(lower(t, self.scale, self.gains)), most), least)

    def to_json(self) -> dict[str, Any]:
        return {
            **{k: getattr(self, k) for k in PLAIN},
            "terms": [t.__dict__ for t in self.terms],
            "spreads": [t.__dict__ for t in self.spreads],
            "chance": self.chance.to_json(),
            "reach": self.reach.to_json(),
            "pools": {k: p.to_json() for k, p in self.pools.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Model:
        return cls(
            **{k: data[k] for k in PLAIN},
            terms=tuple(Term(**t) for t in data["terms"]),
            spreads=tuple(Term(**t) for t in data["spreads"]),
            pools={k: Pool.from_json(p) for k, p in data["pools"].items()},
            chance=Chance.from_json(data["chance"]),
            reach=Reach.from_json(data["reach"]),
        )


def conformal(residuals: Sequence[float], shares: Sequence[float], level: float) -> tuple[float, float]:
    """Lower and upper quantile of a new normalised residual, (1 ± level) / 2 each."""
    up = (1 + level) / 2
    low = conformal_above([-r for r in reversed(residuals)], tuple(reversed(shares)), up)
    return -low, conformal_above(residuals, shares, up)


def conformal_above(residuals: Sequence[float], shares: Sequence[float], level: float) -> float:
    """What a new normalised residual exceeds with probability 1 − `level` at most; residuals are ascending.

    A new residual is exchangeable with those seen, so that it takes one place among them: the mass of one of n + 1 is
    put at the far end (Vovk et al. 2005; Lei et al. 2018). Infinite where there are too few."""
    r, w = np.asarray(residuals, float), np.asarray(shares, float)
    if not len(r):
        return math.inf
    effective = 1 / float((w**2).sum())
    at = int(np.searchsorted(np.cumsum(w), level * (1 + 1 / effective) - 1e-12))
    return float(r[at]) if at < len(r) else math.inf


NO_POOL = Pool((), ())


@dataclass(frozen=True)
class Predictor:
    """The models of all modes and ways to merge: (mode, unit, way) -> `Model`; and what an ensemble gains."""

    version: str
    fitted_on: Mapping[str, Any]
    models: Mapping[tuple[str, str, str], Model]
    shares: Shares = field(default_factory=Shares)

    def model(self, mode: str, unit: str, way: str) -> Model | None:
        """None where this way was never measured in this mode."""
        return self.models.get((mode, unit, way))

    def to_json(self) -> dict[str, Any]:
        models = [{"mode": m, "way": w, **x.to_json()} for (m, _, w), x in self.models.items()]
        about = {"format": FORMAT, "version": self.version, "fitted_on": dict(self.fitted_on)}
        return {**about, "ensemble": self.shares.__dict__, "models": models}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Predictor:
        """Raises `MergeidError` for another format."""
        if data.get("format") != FORMAT:
            raise MergeidError(f"the predictor's coefficients have format {data.get('format')!r}; expected {FORMAT!r}")
        models = {(x["mode"], x["unit"], x["way"]): Model.from_json(x) for x in data["models"]}
        return cls(data["version"], data["fitted_on"], models, Shares(**data["ensemble"]))


@cache
def shipped() -> Predictor:
    """The predictor that comes with the package."""
    text = files("mergeid.prediction").joinpath(FILE).read_text(encoding="utf-8")
    return Predictor.from_json(json.loads(text))
