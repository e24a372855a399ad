"""Predictors made of what others look at, fitted and left out exactly as mergeid's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mergeid.prediction.fitting import Design, left_out
from mergeid.prediction.model import Term, lift

SCALES = {"nats": 0.02, "points": 1.0}
SINGLE = {
    "distance of weights": (Term("distance", None),),
    "cosine of weights": (Term("cosine", 0.5, sign=-1),),
    "CKA": (Term("rival_cka", 0.5, sign=-1),),
}
METRICS = (
    *("rival_cka", "rival_cka_last", "rival_l2", "rival_dot", "rival_angle", "rival_ratio", "rival_left"),
    *("rival_right", "rival_rank", "rival_out_l2", "rival_out_cosine"),
    *("rival_gradient_cosine", "rival_gradient_l2", "rival_gradient_dot", "distance", "cosine"),
)
LINEAR = "linear, metrics of arXiv:2601.22285"
RIVALS = (*SINGLE, LINEAR)
PENALTIES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


def rival_scores(name: str, cases: Sequence[Any], unit: str) -> list[float]:
    """What a rival predicts for every case when its family is left out, "nats" or "points" on mergeid's scale."""
    if name in SINGLE:
        rows, families = [c.row(unit) for c in cases], [c.pair["family"] for c in cases]
        return [i.score for i in left_out(Design(unit, SCALES[unit], SINGLE[name]), rows, families)]
    return _lasso(cases, unit)


def _lasso(cases: Sequence[Any], unit: str) -> list[float]:
    """L1-regularised least squares on standardised metrics, as published; the penalty is chosen on families left out
    of the rest."""
    from sklearn.linear_model import Lasso

    x = np.array([[c.features.get(m, 0.0) for m in METRICS] for c in cases])
    y = np.asarray(lift([c.row(unit).target for c in cases], SCALES[unit]))
    family = np.array([c.pair["family"] for c in cases])
    found = np.zeros(len(y))

    def fitted(train: np.ndarray, test: np.ndarray, penalty: float) -> np.ndarray:
        mean, std = x[train].mean(0), x[train].std(0) + 1e-12
        model = Lasso(alpha=penalty, max_iter=50_000).fit((x[train] - mean) / std, y[train])
        return model.predict((x[test] - mean) / std)

    for f in np.unique(family):
        rest = family != f
        errors = []
        for penalty in PENALTIES:
            total = 0.0
            for g in np.unique(family[rest]):
                train, held = rest & (family != g), rest & (family == g)
                total += float(((fitted(train, held, penalty) - y[held]) ** 2).sum())
            errors.append(total)
        found[~rest] = fitted(rest, ~rest, PENALTIES[int(np.argmin(errors))])
    return found.tolist()
