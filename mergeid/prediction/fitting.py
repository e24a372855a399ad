"""Fit the predictor to measured pairs, and say how well it does on families that it has not seen.

Only whole groups (families, data sets) are ever left out: pairs of one family share models, data and habits. The
residuals that intervals are made of are those on groups left out, too (cross-conformal, by group), and every group
counts alike, but where intervals are widened to hold enough rows of groups left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls

from mergeid.prediction.chance import fitted_chance
from mergeid.prediction.model import (
    ALL,
    FROM_ZERO,
    LEVEL,
    Interval,
    Model,
    Pool,
    Reach,
    Term,
    conformal,
    conformal_above,
    lift,
    start,
)

LEAST = 0.05
"""Smallest scale of an error on the target's scale."""
WIDENED = 0.91
"""Share of the rows of groups left out that intervals are widened to hold: more than `LEVEL`, since a new group may lie
farther out than few groups tell. Chosen where families and, which nothing is fitted to, data sets are left out. Where
gains are told, and no target is cut off at 0, `LEVEL` is enough."""
NARROWED = 200
"""Rows of a pool, where gains are told, from which intervals that hold too many are narrowed."""
MOST = 200
"""Residuals of a pool that are kept in the file."""
LEAST_POOL = 40
"""Rows from which pairs of one kind of start have a pool of their own."""
TOLERATED, NATS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5), 0.02
"""Losses in nats whose chances are fitted; of a target on another scale than `NATS` as many times as large."""


@dataclass(frozen=True)
class Design:
    """What is fitted: terms of the prediction and of the error's scale, without weights, what a collapsed network tells
    of its inputs at most, and how much gains count (`Model.gains`)."""

    unit: str
    scale: float
    terms: tuple[Term, ...]
    spreads: tuple[Term, ...] = ()
    collapsed: float = 0.0
    gains: float = 0.0


@dataclass(frozen=True)
class Row:
    """One measured pair under one assignment.

    Attributes:
        target: barrier in nats or points, or what is lost; negative where it is gained.
        group: what is left out together. weight: in the fit.
    """

    features: Mapping[str, float]
    target: float
    group: str
    weight: float = 1.0


def fit(design: Design, rows: Sequence[Row], *, calibrate: bool = True) -> Model:
    """Weights by non-negative least squares, every group weighing alike; then the scale of the errors and, from groups
    left out one after the other, the residuals of the intervals and the chance of staying within a loss.

    Raises ValueError for rows of a single group where intervals are asked for."""
    model = _least_squares(design, rows)
    if not calibrate:
        return model
    groups = sorted({r.group for r in rows})
    if len(groups) < 2:
        raise ValueError("intervals need at least two groups")
    others = [(_least_squares(design, [r for r in rows if r.group != g]), _of(rows, g)) for g in groups]
    left = np.concatenate([_residuals(m, own) for m, own in others])
    ordered = [r for _, own in others for r in own]
    model = _with_scale(model, design, ordered, left)
    width = np.array([model.width(r.features) for r in ordered])
    normal = left / width
    kinds = np.array([start(r.features) for r in ordered])
    targets = _targets(design, ordered)
    held = normal if design.gains else _held(ordered, normal)
    nothing = (left - targets) / width  # where a loss of 0 lies, in widths from the score
    pools = {}
    for kind in (ALL, *np.unique(kinds).tolist()):
        at = np.flatnonzero((kinds == kind) | (kind == ALL))
        if kind != ALL and not _enough(ordered, at):
            continue
        pools[kind] = _pool([ordered[i] for i in at], held[at], gains=design.gains > 0)
        low, _ = pools[kind].ends(LEVEL)
        from_zero = at[low <= nothing[at]]
        if not design.gains and _enough(ordered, from_zero):
            pools[kind + FROM_ZERO] = _pool([ordered[i] for i in from_zero], held[from_zero], above=True)
    losses = np.asarray(lift(np.array(TOLERATED) * design.scale / NATS, design.scale))
    return replace(model, pools=pools, chance=fitted_chance(losses.tolist(), targets - left, targets))


def _enough(rows: Sequence[Row], at: np.ndarray) -> bool:
    """For a pool of their own."""
    return len(at) >= LEAST_POOL and len({rows[i].group for i in at}) > 2


def _held(rows: Sequence[Row], normal: np.ndarray) -> np.ndarray:
    """Residuals that a cut-off interval has to reach: a target of 0 lies in every one that ends at 0."""
    return np.where([r.target <= 0 for r in rows], np.minimum(normal, 0.0), normal)


def _pool(rows: Sequence[Row], normal: np.ndarray, *, above: bool = False, gains: bool = False) -> Pool:
    """Of intervals with two ends, or with an upper one alone."""
    share = _shares(rows)
    order = np.argsort(normal, kind="stable")
    kept, shares = _thinned(normal[order], share[order])
    return Pool(tuple(kept), tuple(shares), _stretch(rows, normal, share, above, gains))


def _stretch(rows: Sequence[Row], normal: np.ndarray, shares: np.ndarray, above: bool, gains: bool) -> float:
    """By how much the intervals of all other groups must be widened to hold a share `WIDENED` (`gains`: `LEVEL`) of the
    rows of the groups left out, since groups differ by more than what varies inside them; at least 1, but for many rows
    with `gains`."""
    names = np.array([r.group for r in rows])
    needed = np.full(len(rows), np.inf)
    for g in np.unique(names):
        rest = names != g
        order = np.argsort(normal[rest], kind="stable")
        known = normal[rest][order].tolist(), (shares[rest][order] / shares[rest].sum()).tolist()
        low, high = (-np.inf, conformal_above(*known, LEVEL)) if above else conformal(*known, LEVEL)
        if low < 0 < high:
            needed[~rest] = np.maximum(normal[~rest] / low, normal[~rest] / high)
    order = np.argsort(needed, kind="stable")
    at = int(np.searchsorted(np.arange(1, len(order) + 1) / len(order), (LEVEL if gains else WIDENED) - 1e-9))
    found = float(needed[order[min(at, len(order) - 1)]])
    least = 0.0 if gains and len(rows) >= NARROWED else 1.0
    return max(least, found) if np.isfinite(found) else 1.0


def left_out(
    design: Design,
    rows: Sequence[Row],
    by: Sequence[str] | None = None,
    *,
    level: float = LEVEL,
    tolerated: float | None = None,
) -> list[Interval]:
    """What is predicted for every row by a model that has not seen its like.

    Args:
        by: what is left out together, one name a row; None: the rows' groups."""
    names = [r.group for r in rows] if by is None else list(by)
    found: dict[int, Interval] = {}
    for g in sorted(set(names)):
        model = fit(design, [r for r, n in zip(rows, names, strict=True) if n != g])
        for i, row in enumerate(rows):
            if names[i] == g:
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
    return np.asarray(lift([r.target for r in rows], design.scale, design.gains))


def _least_squares(design: Design, rows: Sequence[Row]) -> Model:
    x, y, w = _matrix(design.terms, rows), _targets(design, rows), np.sqrt(_shares(rows))
    # the intercept is free: it enters with both signs
    left = np.column_stack([x, np.ones(len(x)), -np.ones(len(x))])
    weights, _ = nnls(left * w[:, None], y * w)
    terms = tuple(
        replace(t, weight=float(weights[k]), low=float(x[:, k].min()), high=float(x[:, k].max()))
        for k, t in enumerate(design.terms)
    )
    intercept = float(weights[-2] - weights[-1])
    return Model(
        *(design.unit, design.scale, intercept, terms, LEAST, 0.0, ()),
        reach=_reach(x),
        collapsed=design.collapsed,
        gains=design.gains,
    )


def _reach(x: np.ndarray) -> Reach:
    """Of values [rows, terms], with a thousandth of every variance added, as terms may go together."""
    if not x.size:
        return Reach()
    gaps = x - x.mean(0)
    spread = np.atleast_2d(gaps.T @ gaps / len(x))
    precision = np.linalg.inv(spread + np.diag(1e-3 * np.diag(spread) + 1e-9))
    most = float(np.sqrt(np.einsum("ij,jk,ik->i", gaps, precision, gaps).max()))
    return Reach(tuple(x.mean(0).tolist()), tuple(map(tuple, precision.tolist())), max(most, 1e-9))


def _residuals(model: Model, rows: Sequence[Row]) -> np.ndarray:
    return np.array([float(model.lifted(r.target)) - model.score(r.features) for r in rows])


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
