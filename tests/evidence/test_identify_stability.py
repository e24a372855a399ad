"""Shift radii: bounds against eigendecompositions of shifted covariances, optimality against all permutations."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch

from mergeid.errors import MergeidError
from mergeid.evidence.activation_cost import linear_ridge_costs
from mergeid.evidence.function_class import FunctionClasses
from mergeid.evidence.stability import projection_shift, radius, shifts, stability
from mergeid.evidence.support import Support


def support_of(covariance, k):
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1].copy(), vectors[:, ::-1].copy()
    d = len(values)
    return Support(
        torch.from_numpy(vectors), None, k, torch.from_numpy(values), torch.zeros(d, dtype=torch.float64),
        float(values.sum()), True, 100,
    )  # fmt: skip


def layer(m, d, k, rng, *, scaling=None, spread=0.3):
    values = np.concatenate([np.linspace(4, 2, k), np.linspace(0.5, 0.1, d - k)])
    basis = np.linalg.qr(rng.standard_normal((d, d)))[0]
    covariance = basis * values @ basis.T
    fixed = torch.from_numpy(rng.standard_normal((m, d)))
    trained = spread * torch.from_numpy(rng.standard_normal((m, d)))
    weights = fixed + (trained if scaling is None else scaling * trained)
    return covariance, fixed, weights


def random_shift(d, size, rng):
    e = rng.standard_normal((d, d))
    e = e + e.T
    if rng.random() < 0.5:  # few directions
        vector = np.linalg.qr(rng.standard_normal((d, 2)))[0]
        e = vector @ np.array([[rng.standard_normal(), 1], [1, rng.standard_normal()]]) @ vector.T
    return size * e / np.linalg.norm(e, 2)


def projection(covariance, k):
    u = np.linalg.eigh(covariance)[1][:, -k:]
    return u @ u.T


def permutation_gaps(cost):
    n = len(cost)
    rows = np.arange(n)
    for p in permutations(range(n)):
        if p != tuple(rows):
            yield np.array(p), cost[rows, list(p)].sum() - np.trace(cost)


def test_projection_moves_by_the_stated_amount_at_most():
    rng = np.random.default_rng(0)
    for _ in range(200):
        d, k = 6, 2
        covariance, _, _ = layer(1, d, k, rng)
        values = np.linalg.eigvalsh(covariance)[::-1]
        gap = values[k - 1] - values[k]
        epsilon = gap * rng.uniform(0.01, 0.499)
        shifted = covariance + random_shift(d, epsilon, rng)
        moved = np.linalg.norm(projection(covariance, k) - projection(shifted, k), 2)
        assert moved <= projection_shift(epsilon, gap) * (1 + 1e-9)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.49])
def test_the_bound_is_sharp(share):
    """Two dimensions, every symmetric E of norm ε with eigenvalues ±ε: the worst one reaches the bound."""
    covariance = np.diag([3.0, 1.0])
    worst = 0.0
    for angle in np.linspace(0, np.pi, 4001):
        c, s = np.cos(angle), np.sin(angle)
        e = share * 2 * np.array([[c, s], [s, -c]])
        worst = max(worst, np.linalg.norm(projection(covariance, 1) - projection(covariance + e, 1), 2))
    assert worst == pytest.approx(projection_shift(share * 2, 2.0), rel=1e-5)


def test_radius_inverts_the_bound():
    for gap in (0.3, 2.0):
        for eta in (0.01, 0.3, 0.7):
            assert projection_shift(radius(eta, gap), gap) == pytest.approx(eta)
        assert radius(0.8, gap) == radius(1.0, gap) == gap / 2 and radius(0.0, gap) == 0
        assert projection_shift(gap, gap) == 1


def test_swap_costs_move_by_the_stated_amount_at_most():
    rng = np.random.default_rng(1)
    for _ in range(40):
        m, d, k = 5, 7, 3
        covariance, fixed, weights = layer(m, d, k, rng, spread=1.0)
        support = support_of(covariance, k)
        epsilon = support.eigengap * rng.uniform(0.05, 0.45)
        other = support_of(covariance + random_shift(d, epsilon, rng), k)
        eta = np.linalg.norm((support.U @ support.U.T - other.U @ other.U.T).numpy(), 2)
        one, two = (FunctionClasses(fixed, (s,)).costs(weights).numpy() for s in (support, other))
        for i in range(m):
            for j in range(i):
                t, u = (c[i, j] + c[j, i] - c[i, i] - c[j, j] for c in (one, two))
                bound = 2 * eta * float((weights[i] - weights[j]).norm() * (fixed[i] - fixed[j]).norm())
                assert abs(t - u) <= bound * (1 + 1e-9)


@pytest.mark.parametrize("case", ["plain", "mask", "real", "row space", "large scaling"])
def test_no_certified_decision_flips(case):
    """Random shifts of just under the radius: no swap turns, no permutation beats the identity."""
    rng = np.random.default_rng(2)
    m, d, k = 5, 8, 2
    certified = 0
    for _ in range(25):
        scaling = rows = None
        if case == "mask":
            scaling = torch.from_numpy((rng.random((m, d)) < 0.85).astype(float))
        elif case in ("real", "large scaling"):
            scaling = torch.from_numpy(rng.uniform(0.7, 1, (m, d))) * (3.0 if case == "large scaling" else 1.0)
        covariance, fixed, weights = layer(m, d, k, rng, scaling=scaling, spread=0.1)
        if case == "row space":
            rows = torch.from_numpy(np.linalg.qr(rng.standard_normal((d, 7)))[0])
            weights = fixed + (weights - fixed) @ rows @ rows.T
        support = support_of(covariance, k)
        classes = FunctionClasses(fixed, (support,), scaling, rows)
        found = stability(classes, weights)
        assert found.permutations <= found.pairs + 1e-12 and found.pairs <= found.gap / 2
        assert (found.ridge_pairs is None) == (case != "plain")
        for radius_of, kind in ((found.pairs, "pairs"), (found.permutations, "all")):
            if radius_of == 0:
                continue
            certified += 1
            for _ in range(6):
                other = support_of(covariance + random_shift(d, 0.999 * radius_of, rng), k)
                cost = FunctionClasses(fixed, (other,), scaling, rows).costs(weights).numpy()
                for p, gap in permutation_gaps(cost):
                    if kind == "all" or (p != np.arange(m)).sum() == 2:
                        assert gap > 0
    assert certified >= 20


def test_general_scaling_of_one_is_the_plain_case():
    rng = np.random.default_rng(3)
    covariance, fixed, weights = layer(5, 7, 3, rng)
    support = support_of(covariance, 3)
    plain = stability(FunctionClasses(fixed, (support,)), weights)
    general = stability(FunctionClasses(fixed, (support,), torch.ones(5, 7)), weights)
    assert general.pairs == pytest.approx(plain.pairs, rel=1e-6)
    assert general.permutations == pytest.approx(plain.permutations, rel=1e-6)


def test_largest_shift_over_all_permutations_by_brute_force():
    """min over π of Δ_π / 2 Σ ‖w_π(i) − w_i‖ ‖f_i − f̄‖, and the least ratio over swaps."""
    rng = np.random.default_rng(4)
    positive = 0
    for _ in range(30):
        m, d, k = 5, 6, 3
        covariance, fixed, weights = layer(m, d, k, rng, spread=0.6)
        support = support_of(covariance, k)
        classes = FunctionClasses(fixed, (support,))
        cost = classes.costs(weights)
        pairs, everything = shifts(classes, weights, cost)
        w, f = weights.numpy(), fixed.numpy()
        middle = np.linalg.norm(f - f.mean(0), axis=1)
        best = min(
            gap / (2 * (np.linalg.norm(w[p] - w, axis=1) * middle).sum()) for p, gap in permutation_gaps(cost.numpy())
        )
        assert everything == pytest.approx(max(best, 0), rel=1e-8, abs=1e-12)
        swaps = []
        for i in range(m):
            for j in range(i):
                t = float(cost[i, j] + cost[j, i] - cost[i, i] - cost[j, j])
                swaps.append(t / (2 * np.linalg.norm(w[i] - w[j]) * np.linalg.norm(f[i] - f[j])))
        assert pairs == pytest.approx(max(min(swaps), 0), rel=1e-8, abs=1e-12)
        positive += everything > 0
    assert 5 < positive < 30


def test_ridge_radius_needs_no_gap():
    """Equal eigenvalues at k: no gap, and the ridge form still holds; its kernel moves by ε/ρ at most."""
    rng = np.random.default_rng(5)
    certified = 0
    for _ in range(25):
        m, d, k, rho = 4, 6, 2, 0.5
        basis = np.linalg.qr(rng.standard_normal((d, d)))[0]
        covariance = basis * np.array([3, 1, 1, 1, 0.5, 0.2]) @ basis.T
        fixed = torch.from_numpy(rng.standard_normal((m, d)))
        weights = fixed + 0.2 * torch.from_numpy(rng.standard_normal((m, d)))
        support = support_of(covariance, k)
        found = stability(FunctionClasses(fixed, (support,)), weights, ridge=rho)
        assert found.permutations < 1e-9 and found.ridge_permutations <= found.ridge_pairs + 1e-12
        for _ in range(6):
            size = 0.999 * found.ridge_permutations
            shifted = covariance + random_shift(d, size, rng)
            if np.linalg.eigvalsh(shifted)[0] < 0:
                continue  # no covariance
            kernels = [s @ np.linalg.inv(s + rho * np.eye(d)) for s in (covariance, shifted)]
            assert np.linalg.norm(kernels[0] - kernels[1], 2) <= size / rho * (1 + 1e-9)
            whole = FunctionClasses(fixed, (support_of(shifted, d),))
            for _, gap in permutation_gaps(linear_ridge_costs(whole, weights, rho).numpy()):
                assert gap > 0
            certified += size > 0
    assert certified > 30


def test_no_certificate():
    rng = np.random.default_rng(6)
    covariance, fixed, weights = layer(4, 6, 3, rng)
    support = support_of(covariance, 3)
    # a singular S
    mask = torch.ones(4, 6)
    mask[0] = 0
    still = weights.clone()
    still[0] = fixed[0]
    found = stability(FunctionClasses(fixed, (support,), mask), still)
    assert found.pairs == 0 and found.permutations == 0
    # an identity that is not optimal
    swapped = weights[[1, 0, 2, 3]]
    found = stability(FunctionClasses(fixed, (support,)), swapped)
    assert found.pairs == found.permutations == found.ridge_pairs == found.ridge_permutations == 0
    # nothing known
    found = stability(FunctionClasses(torch.zeros(4, 6), (support,)), weights)
    assert found.permutations == 0 and found.by_gap == 0 and found.by_norm == 0
    # inputs without any variance
    empty = support_of(np.zeros((6, 6)), 0)
    assert stability(FunctionClasses(fixed, (empty,)), weights).by_norm == 0


def test_a_free_scale_has_no_certificate():
    covariance, fixed, weights = layer(4, 6, 3, np.random.default_rng(8))
    with pytest.raises(MergeidError, match="frees the scale"):
        stability(FunctionClasses(fixed, (support_of(covariance, 3),), free_scale=True), weights)


def test_a_sketchs_error_is_taken_off_and_groups_take_the_least():
    rng = np.random.default_rng(7)
    covariance, fixed, weights = layer(8, 6, 3, rng, spread=0.1)
    one = support_of(covariance, 3)
    two = support_of(4 * covariance, 3)
    both = stability(FunctionClasses(fixed, (one, two)), weights)
    parts = [stability(FunctionClasses(fixed[p], (s,)), weights[p]) for s, p in ((one, slice(4)), (two, slice(4, 8)))]
    assert both.permutations == min(p.permutations for p in parts) > 0
    assert both.gap == parts[0].gap and both.norm == parts[0].norm
    assert both.by_gap == both.permutations / both.gap
    error = parts[0].permutations / 3
    loose = stability(FunctionClasses(fixed[:4], (replace(one, error=error),)), weights[:4])
    assert loose.permutations == pytest.approx(parts[0].permutations - error)
    assert loose.ridge_permutations == pytest.approx(parts[0].ridge_permutations - error)
