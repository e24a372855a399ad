"""Fit the predictor to measured pairs, and say how well it does on families that it has not seen.

Only whole groups (families, data sets) are ever left out: pairs of one family share models, data and habits. The
residuals that intervals are made of are those on groups left out, too (cross-conformal, by group), and every group
counts alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls

from mergeid.prediction.model import Interval, Model, Term, conformal, lift

LEAST = 0.05
"""Smallest scale of an error on the target's scale."""
LEVEL, EVERYWHERE = 0.9, 0.85
"""Coverage of the intervals over all families, and within each family but the worst."""
MOST = 400
"""Residuals that are kept in the file."""


@dataclass(frozen=True)
class Design:
    """What is fitted: terms of the prediction and of the error's scale, without weights."""

    unit: str
    scale: float
    terms: tuple[Term, ...]
    spreads: tuple[Term, ...] = ()


@dataclass(frozen=True)
class Row:
    """One measured pair under one assignment.

    Attributes:
        target: barrier in nats or points.
        group: what is left out together. weight: in the fit.
    """

    features: Mapping[str, float]
    target: float
    group: str
    weight: float = 1.0


def fit(design: Design, rows: Sequence[Row], *, calibrate: bool = True) -> Model:
    """Weights by non-negative least squares, every group weighing alike; then the scale of the errors and, from groups
    left out one after the other, the residuals of the intervals.

    Raises ValueError for rows of a single group where intervals are asked for."""
    model = _least_squares(design, rows)
    if not calibrate:
        return model
    groups = sorted({r.group for r in rows})
    if len(groups) < 2:
        raise ValueError("intervals need at least two groups")
    left = np.concatenate(
        [_residuals(_least_squares(design, [r for r in rows if r.group != g]), _of(rows, g)) for g in groups]
    )
    ordered = [r for g in groups for r in _of(rows, g)]
    model = _with_scale(model, design, ordered, left)
    share = _shares(ordered)
    normal = left / np.array([model.width(r.features) for r in ordered])
    order = np.argsort(normal, kind="stable")
    kept, shares = _thinned(normal[order], share[order])
    stretch = _stretch(ordered, normal, share)
    return replace(model, residuals=tuple(kept), shares=tuple(shares), stretch=stretch)


def _stretch(rows: Sequence[Row], normal: np.ndarray, shares: np.ndarray) -> float:
    """By how much the others' interval must be widened to hold `EVERYWHERE` of a group left out: the second largest
    over the G groups, and at least 1. A new group is exchangeable with these, so that it needs no more with
    probability (G - 1) / (G + 1)."""
    names = np.array([r.group for r in rows])
    # a loss of 0 lies in every interval that is cut off at 0
    wrong = np.where([r.target <= 0 for r in rows], np.minimum(normal, 0.0), normal)
    needed = []
    for g in np.unique(names):
        rest = names != g
        order = np.argsort(normal[rest], kind="stable")
        low, high = conformal(normal[rest][order], shares[rest][order] / shares[rest].sum(), LEVEL)
        if low < 0 < high:
            own = wrong[~rest]
            needed.append(float(np.quantile(np.maximum(own / low, own / high), EVERYWHERE)))
    return max(1.0, *sorted(needed)[-2:-1])


def left_out(
    design: Design, rows: Sequence[Row], *, level: float = 0.9, tolerated: float | None = None
) -> list[Interval]:
    """What is predicted for every row by a model that has not seen its group."""
    found: dict[int, Interval] = {}
    for g in sorted({r.group for r in rows}):
        model = fit(design, [r for r in rows if r.group != g])
        for i, row in enumerate(rows):
            if row.group == g:
                found[i] = model.predict(row.features, level=level, tolerated=tolerated)
    return [found[i] for i in range(len(rows))]


def _of(rows: Sequence[Row], group: str) -> list[Row]:
    return [r for r in rows if r.group == group]


def _matrix(terms: Sequence[Term], rows: Sequence[Row]) -> np.ndarray:
    return np.array([[t.value(r.features) for t in terms] for r in rows], float).reshape(len(rows), len(terms))


def _shares(rows: Sequence[Row]) -> np.ndarray:
    """Weights of the rows, groups alike, sum 1."""
    total: dict[str, float] = {}
    for r in rows:
        total[r.group] = total.get(r.group, 0.0) + r.weight
    return np.array([r.weight / total[r.group] / len(total) for r in rows])


def _targets(design: Design, rows: Sequence[Row]) -> np.ndarray:
    return np.asarray(lift([r.target for r in rows], design.scale))


def _least_squares(design: Design, rows: Sequence[Row]) -> Model:
    x, y, w = _matrix(design.terms, rows), _targets(design, rows), np.sqrt(_shares(rows))
    # the intercept is free: it enters with both signs
    left = np.column_stack([x, np.ones(len(x)), -np.ones(len(x))])
    weights, _ = nnls(left * w[:, None], y * w)
    terms = tuple(
        replace(t, weight=float(weights[k]), low=float(x[:, k].min()), high=float(x[:, k].max()))
        for k, t in enumerate(design.terms)
    )
    return Model(design.unit, design.scale, float(weights[-2] - weights[-1]), terms, LEAST, 0.0, ())


def _residuals(model: Model, rows: Sequence[Row]) -> np.ndarray:
    return np.array([float(lift(r.target, model.scale)) - model.score(r.features) for r in rows])


def _with_scale(model: Model, design: Design, rows: Sequence[Row], residuals: np.ndarray) -> Model:
    """The scale of the error: |residual| by non-negative least squares on its terms."""
    x, w = _matrix(design.spreads, rows), np.sqrt(_shares(rows))
    base = x.min(0) if len(design.spreads) else np.zeros(0)
    left = np.column_stack([x - base, np.ones(len(x))])
    weights, _ = nnls(left * w[:, None], np.abs(residuals) * w)
    spreads = tuple(
        replace(t, weight=float(weights[k]), low=float(x[:, k].min()), high=float(x[:, k].max()))
        for k, t in enumerate(design.spreads)
    )
    return replace(model, spread=float(weights[-1] - (weights[:-1] * base).sum()), spreads=spreads)


def _thinned(values: np.ndarray, shares: np.ndarray) -> tuple[list[float], list[float]]:
    """At most `MOST` residuals with their weights: neighbours become one."""
    if len(values) <= MOST:
        return values.tolist(), shares.tolist()
    parts = np.array_split(np.arange(len(values)), MOST)
    return (
        [float(np.average(values[p], weights=shares[p])) for p in parts],
        [float(shares[p].sum()) for p in parts],
    )


def ranks_agree(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's correlation; nan where one of the two is constant."""
    from scipy.stats import rankdata

    a, b = rankdata(x), rankdata(y)
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 and a.std() > 0 and b.std() > 0 else float("nan")


def area_under_curve(score: Sequence[float], bad: Sequence[bool]) -> float:
    """AUROC of a score for the pairs that are bad; nan where one class is empty."""
    from scipy.stats import rankdata

    s, b = rankdata(score), np.asarray(bad, bool)
    n, m = int(b.sum()), int((~b).sum())
    return float((s[b].sum() - n * (n + 1) / 2) / (n * m)) if n and m else float("nan")


def coverage(rows: Sequence[Row], found: Sequence[Interval]) -> float:
    """Share of rows whose target lies in its interval."""
    inside = [i.low - 1e-9 <= r.target <= i.high + 1e-9 for r, i in zip(rows, found, strict=True)]
    return float(np.mean(inside))
