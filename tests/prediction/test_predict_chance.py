"""The probability of staying within a loss: monotone, and the isotonic regression of what was seen."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeid.prediction.chance import Chance, Steps, fitted_chance

LOSSES = (0.1, 0.5, 2.0)
SEEN = st.lists(st.tuples(st.integers(-8, 24), st.integers(0, 12)), min_size=4, max_size=40, unique_by=lambda x: x[0])


def fitted(seen: list[tuple[int, int]]) -> Chance:
    scores, targets = (np.array(x, float) / 4 for x in zip(*seen, strict=True))
    return fitted_chance(LOSSES, scores, targets)


@settings(max_examples=100, deadline=None)
@given(SEEN)
def test_a_lower_score_or_a_larger_loss_is_never_less_likely(seen: list[tuple[int, int]]) -> None:
    chance = fitted(seen)
    grid = np.linspace(-3, 7, 21)
    found = np.array([[chance(loss, score) for score in grid] for loss in np.linspace(-1, 5, 25)], float)
    assert (np.diff(found, axis=0) >= -1e-12).all() and (np.diff(found, axis=1) <= 1e-12).all()
    assert ((found > 0) & (found < 1)).all()


@settings(max_examples=100, deadline=None)
@given(SEEN)
def test_it_is_the_isotonic_regression_of_what_was_seen(seen: list[tuple[int, int]]) -> None:
    """Against the min-max formula, by brute force: pairs of one level are one block, its chance that of its centre."""
    ordered = sorted(seen)
    n = len(ordered)
    for loss, steps in zip(LOSSES, fitted(seen).steps, strict=True):
        inside = [y / 4 <= loss for _, y in ordered]
        levels = [
            min(max(float(np.mean(inside[j : k + 1])) for k in range(i, n)) for j in range(i + 1)) for i in range(n)
        ]
        centres, chances = [], []
        for level in sorted(set(np.round(levels, 9)), reverse=True):
            block = [i for i in range(n) if abs(levels[i] - level) < 1e-6]
            centres.append(np.mean([ordered[i][0] / 4 for i in block]))
            chances.append((sum(inside[i] for i in block) + 0.5) / (len(block) + 1))
        assert steps.scores == pytest.approx(centres, abs=1e-4)
        assert steps.chances == pytest.approx(np.minimum.accumulate(chances), abs=1e-4)


def test_what_is_said_is_so_on_new_pairs() -> None:
    """A chance that no logistic curve follows: it falls, hardly changes, and falls again."""
    rng = np.random.default_rng(0)

    def drawn(n: int) -> tuple[np.ndarray, np.ndarray]:
        scores = rng.uniform(0, 4, n)
        stays = rng.random(n) < np.interp(scores, [0, 1, 3, 4], [0.95, 0.6, 0.5, 0.05])
        return scores, np.where(stays, 0.0, 9.0)

    chance = fitted_chance((0.5,), *drawn(1500))
    scores, targets = drawn(4000)
    said = np.array([chance(0.5, s) for s in scores], float)
    for low in np.arange(0, 1, 0.2):
        at = (said >= low) & (said < low + 0.2)
        if at.sum() > 100:
            assert said[at].mean() == pytest.approx((targets[at] <= 0.5).mean(), abs=0.08)


def test_losses_between_and_beyond_those_fitted() -> None:
    chance = Chance((1.0, 2.0), (Steps((0.0, 2.0), (0.8, 0.2)), Steps((0.0, 2.0), (0.9, 0.6))))
    assert chance(1.5, 1.0) == pytest.approx((0.5 + 0.75) / 2)
    assert chance(0.5, 1.0) == pytest.approx(chance(1.0, 1.5)) and chance(2.5, 1.0) == pytest.approx(chance(2.0, 0.5))
    assert Chance()(1.0, 0.0) is None


def test_read_back() -> None:
    chance = fitted([(0, 0), (1, 9), (2, 1), (4, 10), (7, 12)])
    again = Chance.from_json(json.loads(json.dumps(chance.to_json())))
    assert [again(loss, 0.7) for loss in (0.05, 0.3, 3.0)] == pytest.approx([chance(x, 0.7) for x in (0.05, 0.3, 3.0)])
