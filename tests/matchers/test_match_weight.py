"""Assignments, scores that are kept while neurons move, and descent."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from graph_helpers import seeded, traced
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from test_match_cycle import graph_of, nested, states
from test_match_symmetries import Residual

from mergeid.matchers import WeightSimilarity, assign, weight_matching
from mergeid.matchers.inner_products import KeptScores
from mergeid.matchers.layerwise import layerwise_matching
from mergeid.matchers.weight import good_start


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(0, 10_000), st.sampled_from([0.0, 1e3]))
def test_assignment_is_optimal_whatever_rows_and_columns_share(n: int, seed: int, offset: float) -> None:
    rng = np.random.default_rng(seed)
    score = rng.normal(size=(n, n))
    best = score[linear_sum_assignment(score, maximize=True)].sum()
    shifted = score + offset * rng.normal(size=(n, 1)) + offset * rng.normal(size=(1, n))
    before = shifted.copy()
    found = assign(shifted)
    assert sorted(found.tolist()) == list(range(n))
    assert score[np.arange(n), found].sum() == pytest.approx(best, abs=1e-8)
    assert np.array_equal(shifted, before)


def test_ties_go_to_the_identity() -> None:
    for score in (np.zeros((5, 5)), np.ones((5, 5)), np.outer(np.arange(5), np.ones(5)).astype(np.float32)):
        assert np.array_equal(assign(score), np.arange(5))


def test_kept_scores_are_the_scores() -> None:
    """After elements that move everything, a few neurons, or nothing, in any order."""
    model = seeded(Residual)
    shapes = [(traced(model, (torch.randn(2, 2, 6, 6, dtype=torch.float64),)), dict(model.state_dict())), nested()]
    for graph, a in shapes:
        generator = torch.Generator().manual_seed(1)
        b = {k: torch.randn(v.shape, generator=generator) if v.is_floating_point() else v for k, v in a.items()}
        similarity = WeightSimilarity(graph, a, b)
        kept = KeptScores(similarity)
        element = graph.identity()
        for step in range(12):
            only = [graph.spaces[step % len(graph.spaces)].id]
            moved = graph.random_element(generator, only=only if step % 3 else None)
            if step % 4 == 1:  # two neurons of one space without others inside
                space = next(s for s in reversed(graph.spaces) if s.members > 1)
                moved = {k: p.copy() for k, p in element.items()}
                moved[space.id][:2] = moved[space.id][1::-1]
            element = moved
            for s in graph.spaces:
                fresh = similarity.scores(s, element)
                assert np.allclose(kept.scores(s, element), fresh, rtol=1e-5, atol=1e-4 * np.abs(fresh).max())


def test_scores_are_what_a_loop_says() -> None:
    graph = graph_of(3, 4, 2)
    a, b = states(2, 3, 4, 2)
    (space,) = graph.spaces
    similarity = WeightSimilarity(graph, a, b, scale=False)
    element = {space.id: np.array([2, 0, 3, 1])}
    found = similarity.scores(space, element)
    for i, j in itertools.product(range(4), range(4)):
        wanted = a["0.weight"][i] @ b["0.weight"][j] + a["0.bias"][i] * b["0.bias"][j]
        wanted = wanted + a["2.weight"][:, i] @ b["2.weight"][:, j]
        assert found[i, j] == pytest.approx(float(wanted), abs=1e-5)
    rows = np.arange(4)
    frozen = float((a["2.bias"] * b["2.bias"]).sum()) if "2.bias" in graph.on_tensor else 0.0
    assert similarity.objective(element) == pytest.approx(
        float(found[rows, element[space.id]].sum()) + frozen, rel=1e-5
    )


def test_descent_never_falls_and_starts_where_it_is_best() -> None:
    graph = graph_of(6, 20, 16, 3)
    for seed in range(3):
        a, b = (states(seed + 2, 6, 20, 16, 3)[k] for k in (0, seed + 1))
        similarity = WeightSimilarity(graph, a, b)
        starts = [graph.identity(), layerwise_matching(similarity)]
        values = [similarity.objective(s) for s in starts]
        assert similarity.objective(good_start(similarity)) == pytest.approx(max(values))
        last = max(values)
        for passes in (1, 2, 50):
            found = weight_matching(
                similarity,
                generator=torch.Generator().manual_seed(0),
                element=good_start(similarity),
                max_passes=passes,
            )
            value = similarity.objective(found)
            assert value >= last - 1e-4 * abs(last)
            last = value
        for s in graph.spaces:  # no swap of two neurons gains any more
            score = similarity.scores(s, found)
            best = score[linear_sum_assignment(score, maximize=True)].sum()
            assert score[np.arange(s.size), found[s.id]].sum() == pytest.approx(best, rel=1e-5)
