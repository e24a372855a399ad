"""The exact margin against all permutations, and the facts about swaps and optimality."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from mergeid.errors import MergeidError
from mergeid.evidence.function_class import FunctionClasses
from mergeid.evidence.margin import best_permutation, least_swap, margin, sensitivity, swap_costs
from mergeid.evidence.support import InputMoments


def brute_force(cost):
    """(min over π ≠ id of Δ_π, over transpositions)."""
    n = len(cost)
    best, swaps = np.inf, np.inf
    for p in permutations(range(n)):
        if p == tuple(range(n)):
            continue
        delta = sum(cost[i, p[i]] - cost[i, i] for i in range(n))
        best = min(best, delta)
        if sum(p[i] != i for i in range(n)) == 2:
            swaps = min(swaps, delta)
    return best, swaps


def check(cost):
    found = margin(torch.from_numpy(cost))
    best, swaps = brute_force(cost)
    scale = np.abs(cost[np.isfinite(cost)]).max() + 1e-300
    assert found.value == pytest.approx(best, abs=1e-10 * scale)
    assert found.least_swap == pytest.approx(swaps, abs=1e-10 * scale)
    assert found.identity_optimal == (best >= -1e-11 * scale)
    assert found.identifiable == (best > 1e-11 * scale)
    if found.identity_optimal and found.cycle:
        p = np.arange(len(cost))
        p[list(found.cycle)] = np.roll(found.cycle, -1)
        assert sensitivity(torch.from_numpy(cost), p) == pytest.approx(best, abs=1e-10 * scale)
    return found


@settings(max_examples=150, deadline=None)
@given(n=st.integers(2, 6), seed=st.integers(0, 10**6), lift=st.sampled_from([0.0, 0.3, 1.0]), gone=st.floats(0, 0.6))
def test_margin_is_the_minimum_over_all_permutations(n, seed, lift, gone):
    rng = np.random.default_rng(seed)
    cost = rng.random((n, n))
    cost[rng.random((n, n)) < gone] = np.inf
    np.fill_diagonal(cost, rng.random(n) * (1 - lift))
    check(cost)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 6), seed=st.integers(0, 10**6))
def test_margin_with_ties(n, seed):
    check(np.random.default_rng(seed).integers(0, 3, (n, n)).astype(float))


def test_a_longer_cycle_below_every_swap():
    """1 → 2 → 3 → 1 costs 0.3, every swap at least 1.1."""
    cost = np.array([[0, 0.1, 1], [1, 0, 0.1], [0.1, 1, 0]])
    found = check(cost)
    assert found.value == pytest.approx(0.3) and set(found.cycle) == {0, 1, 2} and found.least_swap > 1
    assert found.identity_optimal


def test_potentials_are_needed():
    """Negative edges, identity optimal all the same: costs shifted by a potential."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        n = 6
        shift = rng.standard_normal(n) * 3
        cost = rng.random((n, n)) + shift[None, :] - shift[:, None]
        np.fill_diagonal(cost, 0)
        assert cost.min() < 0 and check(cost).identity_optimal


def planted(n, k, rng):
    """Costs of trained weights that lie near a fixed part, D = 1, on a small support."""
    f = rng.standard_normal((n, k))
    w = f + 1.5 * rng.standard_normal((n, k))
    return ((w[None] - f[:, None]) ** 2).sum(2)


def test_positive_swaps_do_not_make_the_identity_optimal():
    rng = np.random.default_rng(0)
    seen = {True: 0, False: 0}
    for _ in range(4000):
        cost = planted(5, 3, rng)
        swap = cost + cost.T - cost.diagonal()[:, None] - cost.diagonal()[None]
        if (swap[~np.eye(5, dtype=bool)] > 0).all():
            found = check(cost)
            seen[found.identity_optimal] += 1
            assert found.identity_optimal or found.value < 0 < found.least_swap
    assert seen[False] > 5 and seen[True] > 5


def test_not_optimal_says_the_sensitivity_of_the_best_assignment():
    rng = np.random.default_rng(1)
    cost = rng.random((40, 40))
    found = margin(torch.from_numpy(cost))
    rows, columns = linear_sum_assignment(cost)
    assert not found.identity_optimal and not found.identifiable
    assert found.value == pytest.approx(cost[rows, columns].sum() - np.trace(cost))
    assert set(found.cycle) == set(np.flatnonzero(columns != rows).tolist())


def test_margin_of_a_larger_matrix_by_removing_edges():
    """Another exact route: the second-best assignment is the best with one diagonal entry forbidden."""
    rng = np.random.default_rng(2)
    for n, trial in [(30, 0), (60, 1), (60, 2)]:
        f = rng.standard_normal((n, 3 + trial))
        w = f + 0.1 * rng.standard_normal(f.shape)
        cost = ((w[None] - f[:, None]) ** 2).sum(2)
        best = np.inf
        for i in range(n):
            forbidden = cost.copy()
            forbidden[i, i] = np.inf
            rows, columns = linear_sum_assignment(forbidden)
            best = min(best, forbidden[rows, columns].sum() - np.trace(cost))
        found = margin(torch.from_numpy(cost))
        assert found.value == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_nothing_known_identifies_nothing():
    """F = 0: all classes are equal, so that every assignment costs the same."""
    a = np.random.default_rng(3).standard_normal((9, 4))
    cost = torch.from_numpy(np.tile((a**2).sum(1), (9, 1)))
    found = margin(cost)
    assert found.value == 0 and found.identity_optimal and not found.identifiable


def test_agrees_with_stored_values_of_the_papers_formulas():
    """tests/fixtures/make_identify_reference.py has them in NumPy: U, k, coherence, C, T and the three objectives."""
    r = np.load(Path(__file__).parents[1] / "fixtures" / "identify_reference.npz")
    moments = InputMoments(r["x"].shape[1])
    moments.add(torch.from_numpy(r["x"]))
    support = moments.support(float(r["tau"]))
    assert support.k == r["k"]
    np.testing.assert_allclose((support.U @ support.U.T).numpy(), r["projection"], atol=1e-9)
    for name in ("explained", "coherence", "eigengap"):
        assert getattr(support, name) == pytest.approx(float(r[name]), rel=1e-7)
    classes = FunctionClasses(torch.from_numpy(r["fixed"]), (support,), torch.from_numpy(r["mask"]))
    cost = classes.costs(torch.from_numpy(r["effective"]))
    np.testing.assert_allclose(cost.numpy(), r["cost"], rtol=1e-6)
    np.testing.assert_allclose(swap_costs(cost).numpy(), r["swap"], rtol=1e-6, atol=1e-6)
    best = best_permutation(cost)
    assert float(cost.diagonal().sum()) == pytest.approx(float(r["identity"]), rel=1e-6)
    assert float(cost[torch.arange(len(cost)), torch.from_numpy(best)].sum()) == pytest.approx(float(r["optimal"]))
    assert float(cost.mean()) * len(cost) == pytest.approx(float(r["random"]), rel=1e-6)


def test_swaps_in_chunks(monkeypatch):
    rng = np.random.default_rng(4)
    cost = torch.from_numpy(planted(23, 4, rng) + np.where(np.eye(23), 0, 5))
    whole, swap, full = margin(cost), least_swap(cost), swap_costs(cost)
    monkeypatch.setattr("mergeid.evidence.margin.ROWS", 50)
    assert margin(cost) == whole and least_swap(cost) == swap
    full.fill_diagonal_(np.inf)
    assert swap[0] == float(full.min()) and float(full[swap[1], swap[2]]) == swap[0]


def test_single_neurons_and_unrealizable_swaps_have_an_infinite_margin():
    assert margin(torch.ones(1, 1, dtype=torch.float64)).value == np.inf
    cost = torch.full((4, 4), np.inf, dtype=torch.float64).fill_diagonal_(1.0)
    cost[0, 1] = 0.5  # no way back
    found = margin(cost)
    assert found.value == np.inf and found.identity_optimal and found.cycle == ()


def test_a_neuron_outside_of_its_own_class_is_an_error():
    cost = torch.ones(3, 3, dtype=torch.float64)
    cost[1, 1] = np.inf
    for function in (margin, swap_costs, least_swap):
        with pytest.raises(MergeidError, match="neuron 1 does not lie in its own function class"):
            function(cost)
