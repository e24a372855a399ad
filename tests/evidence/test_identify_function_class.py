"""Realization costs, swaps and separation against NumPy derivations and generic least squares, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar
from scipy.stats import chi2

from mergeid.errors import MergeidError
from mergeid.evidence.function_class import FunctionClasses
from mergeid.evidence.margin import swap_costs
from mergeid.evidence.separation import anisotropy, anisotropy_bound, gamma_in, gamma_out
from mergeid.evidence.support import InputMoments, Support, TokenCounts


def support_of(d, k, seed=0, rows=400, tau=None):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, d)) * np.linspace(3, 0.5, d) @ np.linalg.qr(rng.standard_normal((d, d)))[0]
    moments = InputMoments(d)
    moments.add(torch.from_numpy(x))
    found = moments.support(tau or 0.9)
    return found if tau else found.with_k(k)


def random(*shape, seed):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def lstsq_costs(u, fixed, maps, weights):
    """Independent derivation: minimum-norm least squares, neuron by neuron; (costs, relative residuals)."""
    m = len(fixed)
    cost, residual = np.zeros((m, m)), np.zeros((m, m))
    for i in range(m):
        for j in range(m):
            b = u.T @ (weights[j] - fixed[i])
            w = np.linalg.pinv(u.T @ maps[i]) @ b
            cost[i, j] = w @ w
            residual[i, j] = np.linalg.norm(u.T @ maps[i] @ w - b) / (
                np.linalg.norm(u.T @ weights[j]) + np.linalg.norm(u.T @ fixed[i])
            )
    return cost, residual


def masks(m, d, share, seed):
    return (random(m, d, seed=seed).abs() < torch.tensor(share)).double()


def test_plain_cost_is_the_projected_distance():
    support = support_of(12, 5)
    fixed, weights = random(7, 12, seed=1), random(7, 12, seed=2)
    cost = FunctionClasses(fixed, (support,)).costs(weights).numpy()
    p = (support.U @ support.U.T).numpy()
    for i in range(7):
        for j in range(7):
            assert cost[i, j] == pytest.approx(np.sum((p @ (weights[j] - fixed[i]).numpy()) ** 2), rel=1e-11)


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("kind", ["mask", "real"])
def test_masked_cost_is_the_least_norm_solution(kind, repeated):
    support = support_of(14, 4)
    scaling = masks(8, 14, 0.9, 3) if kind == "mask" else random(8, 14, seed=3).abs()
    if repeated:
        scaling = scaling[[0, 0, 1, 2, 1, 3, 0, 2]]
    fixed, weights = random(8, 14, seed=1), random(8, 14, seed=2)
    classes = FunctionClasses(fixed, (support,), scaling)
    maps = [np.diag(s) for s in scaling.numpy()]
    expected, residual = lstsq_costs(support.U.numpy(), fixed.numpy(), maps, weights.numpy())
    assert residual.max() < 1e-9
    np.testing.assert_allclose(classes.costs(weights).numpy(), expected, rtol=1e-9)
    assert classes.residuals(weights).max() < 1e-9


@pytest.mark.parametrize("repeated", [False, True])
def test_not_realizable_exactly_where_the_residual_is_not_zero(repeated):
    """Also with at least k free entries: they may still span less than the support."""
    u = np.zeros((8, 3))
    u[:4, 0], u[4:6, 1], u[6:, 2] = 0.5, 0.5**0.5, 0.5**0.5
    support = support_of(8, 3)
    object.__setattr__(support, "directions", torch.from_numpy(np.hstack([u, np.zeros((8, 5))])))
    scaling = torch.ones(6, 8, dtype=torch.float64)
    scaling[0, 4:] = 0  # four free entries, rank 1
    scaling[1, :4] = 0  # rank 2
    scaling[2] = 0  # nothing is free: S = 0
    scaling[3] = scaling[4] = scaling[0] if repeated else torch.tensor([1.0, 0, 0, 0, 1, 0, 0, 0])
    fixed, trained = random(6, 8, seed=1), random(6, 8, seed=2)
    weights = fixed + scaling * trained
    classes = FunctionClasses(fixed, (support,), scaling)
    expected, residual = lstsq_costs(u, fixed.numpy(), [np.diag(s) for s in scaling.numpy()], weights.numpy())
    off = residual > 1e-5
    assert off.sum() > 10 and not off.diagonal().any()
    cost = classes.costs(weights).numpy()
    assert np.array_equal(np.isinf(cost), off)
    np.testing.assert_allclose(cost[~off], expected[~off], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(classes.residuals(weights).numpy(), residual, atol=1e-9)
    assert cost[2, 2] == 0 and np.isinf(np.delete(cost[2], 2)).all()  # the reference code says 0


def test_svd_tells_the_rank_where_s_cannot():
    """Singular values 1 and 1e-9: S has 1e-18 beside 1, below rounding, and yet M has rank 2."""
    support = support_of(3, 2)
    object.__setattr__(support, "directions", torch.eye(3, dtype=torch.float64))
    scaling = torch.tensor([[1.0, 1e-9, 1.0]] * 2, dtype=torch.float64)
    fixed = torch.zeros(2, 3, dtype=torch.float64)
    weights = torch.tensor([[2.0, 0, 5], [0, 1e-9, 5]], dtype=torch.float64)
    torch.testing.assert_close(
        FunctionClasses(fixed, (support,), scaling).costs(weights),
        torch.tensor([[4.0, 1.0], [4.0, 1.0]], dtype=torch.float64),
    )


def test_low_rank_classes():
    support = support_of(10, 4)
    rows = torch.linalg.qr(random(10, 6, seed=4))[0]
    fixed, weights = random(5, 10, seed=1), random(5, 10, seed=2)
    maps = [rows.numpy()] * 5
    expected, residual = lstsq_costs(support.U.numpy(), fixed.numpy(), maps, weights.numpy())
    assert residual.max() < 1e-9
    np.testing.assert_allclose(
        FunctionClasses(fixed, (support,), row_space=rows).costs(weights).numpy(), expected, rtol=1e-9
    )
    few = rows[:, :2]  # rank below k: only what training reached is realizable
    trained = fixed + random(5, 2, seed=5) @ few.T
    expected, residual = lstsq_costs(support.U.numpy(), fixed.numpy(), [few.numpy()] * 5, trained.numpy())
    cost = FunctionClasses(fixed, (support,), row_space=few).costs(trained).numpy()
    assert np.array_equal(np.isinf(cost), ~np.eye(5, dtype=bool))
    np.testing.assert_allclose(cost.diagonal(), expected.diagonal(), rtol=1e-9)
    np.testing.assert_allclose(
        FunctionClasses(fixed, (support,), row_space=few).residuals(trained).numpy(), residual, atol=1e-7
    )


def test_groups_cost_infinity_across():
    one, two = support_of(6, 3, seed=0), support_of(6, 4, seed=1)
    fixed, weights = random(8, 6, seed=1), random(8, 6, seed=2)
    scaling = masks(8, 6, 1.5, 3)
    whole = FunctionClasses(fixed, (one, two), scaling).costs(weights)
    for g, support in enumerate((one, two)):
        part = slice(4 * g, 4 * g + 4)
        own = FunctionClasses(fixed[part], (support,), scaling[part]).costs(weights[part])
        assert torch.equal(whole[part, part], own)
        assert torch.isinf(whole[part, 4 - 4 * g : 8 - 4 * g]).all()


@pytest.mark.parametrize("kind", ["plain", "mask", "shared", "row space"])
def test_free_scale_is_the_best_positive_multiple(kind):
    support = support_of(9, 3)
    fixed, weights = random(6, 9, seed=1), random(6, 9, seed=2)
    scaling = masks(6, 9, 1.2, 3) if kind == "mask" else masks(1, 9, 1.2, 4).expand(6, 9) if kind == "shared" else None
    rows = torch.linalg.qr(random(9, 5, seed=5))[0] if kind == "row space" else None
    cost = FunctionClasses(fixed, (support,), scaling, rows, free_scale=True).costs(weights)
    once = FunctionClasses(fixed, (support,), scaling, rows)
    assert (cost <= once.costs(weights) * (1 + 1e-12)).all()
    for i in range(6):
        for j in range(6):
            scaled = weights.clone()

            def at(log_s, i=i, j=j, scaled=scaled):
                scaled[j] = weights[j] * np.exp(log_s)
                return float(once.costs(scaled)[i, j])

            # coarse search, then golden section: the cost is convex in s
            grid = np.linspace(-12, 4, 33)
            best = grid[np.argmin([at(g) for g in grid])]
            found = minimize_scalar(at, bounds=(best - 0.6, best + 0.6), method="bounded", options={"xatol": 1e-9})
            assert float(cost[i, j]) == pytest.approx(found.fun, rel=1e-4)


def test_free_scale_outside_of_the_image_forces_the_scale():
    support = support_of(3, 2)
    object.__setattr__(support, "directions", torch.eye(3, dtype=torch.float64))
    scaling = torch.tensor([[1.0, 0, 1], [1, 0, 0]], dtype=torch.float64)
    fixed = torch.tensor([[0.0, 2, 0], [0, 2, 0]], dtype=torch.float64)
    weights = torch.tensor([[3.0, 1, 0], [1, -1, 0]], dtype=torch.float64)
    for shared in (False, True):
        d = scaling[[0, 0]] if shared else scaling
        cost = FunctionClasses(fixed, (support,), d, free_scale=True).costs(weights)
        # s = 2 for the first function; no positive s turns −1 into 2
        assert cost[0, 0] == pytest.approx(36) and torch.isinf(cost[0, 1])


def test_swap_formula_holds_for_effective_weights():
    support = support_of(10, 6)
    fixed, trained = random(5, 10, seed=1), random(5, 10, seed=2)
    weights = fixed + trained
    p = support.U @ support.U.T
    swap = swap_costs(FunctionClasses(fixed, (support,)).costs(weights))
    for i in range(5):
        for j in range(5):
            if i == j:
                continue
            df = p @ (fixed[i] - fixed[j])
            effective = 2 * torch.dot(p @ (weights[i] - weights[j]), df)
            of_trained = 2 * torch.dot(p @ (trained[i] - trained[j]), df) + 2 * df.square().sum()
            torch.testing.assert_close(swap[i, j], effective, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(swap[i, j], of_trained, rtol=1e-10, atol=1e-10)


def test_cost_equals_a_generic_solver():
    support = support_of(6, 2)
    fixed, weights, scaling = random(3, 6, seed=1), random(3, 6, seed=2), masks(3, 6, 1.2, 3)
    cost = FunctionClasses(fixed, (support,), scaling).costs(weights)
    u = support.U.numpy()
    for i in range(3):
        for j in range(3):
            target = u.T @ weights[j].numpy()

            def miss(w, i=i, target=target):
                return u.T @ (fixed[i].numpy() + scaling[i].numpy() * w) - target

            slope = u.T * scaling[i].numpy()
            equal = {"type": "eq", "fun": miss, "jac": lambda w, slope=slope: slope}
            found = minimize(lambda w: w @ w, np.zeros(6), jac=lambda w: 2 * w, constraints=equal, method="SLSQP")
            assert np.abs(miss(found.x)).max() < 1e-6
            assert float(cost[i, j]) == pytest.approx(found.fun, rel=1e-5)


def test_least_norm_weight_realizes_the_function_at_its_cost():
    one, two = support_of(8, 3), support_of(8, 4, seed=1)
    fixed, weights, scaling = random(6, 8, seed=1), random(6, 8, seed=2), masks(6, 8, 1.3, 3)
    classes = FunctionClasses(fixed, (one, two), scaling)
    cost = classes.costs(weights)
    for i, j in [(0, 2), (1, 1), (4, 5), (5, 3)]:
        support = (one, two)[i // 3]
        target = support.project(weights[j : j + 1])[0]
        w = classes.least_norm(i, target)
        torch.testing.assert_close(support.project((fixed[i] + scaling[i] * w)[None])[0], target)
        torch.testing.assert_close(w.square().sum(), cost[i, j])


def test_anisotropy_bounds_hold_and_are_reached_by_isotropic_classes():
    support = support_of(9, 4)
    fixed, weights = random(5, 9, seed=1), random(5, 9, seed=2)
    scaling = random(5, 9, seed=3).abs() + 0.1
    classes = FunctionClasses(fixed, (support,), scaling)
    cost = classes.costs(weights)
    low, high = classes.cost_bounds(weights)
    assert (low <= cost * (1 + 1e-9)).all() and (cost <= high * (1 + 1e-9)).all()
    spectrum = classes.spectrum().numpy()
    for i in range(5):
        m = support.U.numpy().T * scaling[i].numpy()
        values = np.linalg.eigvalsh(m @ m.T)
        np.testing.assert_allclose(spectrum[i], [values[0], values[-1]], rtol=1e-8)
    plain = FunctionClasses(fixed, (support,))
    for bound in plain.cost_bounds(weights):
        torch.testing.assert_close(bound, plain.costs(weights))
    dead = scaling.clone()
    dead[1] = 0
    low, high = FunctionClasses(fixed, (support,), dead).cost_bounds(weights)
    assert torch.isinf(high[1]).all() and torch.isinf(low[1]).all()


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_anisotropy_of_random_masks_stays_below_its_bound(share):
    """Operator norms against NumPy; the bound at probability 0.2 is exceeded less often than that."""
    d, k, m = 200, 3, 400
    moments = InputMoments(d)
    moments.add(random(300, k, seed=0) @ random(k, d, seed=1))
    support = moments.support(0.999999)
    scaling = torch.from_numpy((np.random.default_rng(2).random((m, d)) < share).astype(float))
    classes = FunctionClasses(random(m, d, seed=3), (support,), scaling)
    found = anisotropy(classes, share)
    u = support.U.numpy()
    for i in range(0, m, 40):
        s = u.T @ np.diag(scaling[i].numpy()) @ u
        assert float(found[i]) == pytest.approx(np.linalg.norm(s - share * np.eye(k), 2), rel=1e-8)
    settings = {"deviation": max(share, 1 - share), "spread": (share * (1 - share)) ** 0.5}
    bounds = [anisotropy_bound(support.coherence, k, violation=v, **settings) for v in (0.2, 0.01)]
    assert bounds[0] < bounds[1] < 1
    assert float((found > bounds[0]).double().mean()) < 0.2 and float((found > bounds[1]).double().mean()) < 0.01
    assert anisotropy_bound(0.0, 0, violation=0.1, **settings) == 0


def test_gamma_out_by_brute_force():
    one, two = support_of(7, 3), support_of(7, 4, seed=1)
    fixed = random(10, 7, seed=2)
    found = gamma_out(FunctionClasses(fixed, (one, two)))
    expected = min(
        2**0.5 * float((s.U.T @ (fixed[i] - fixed[j])).norm())
        for s, part in ((one, range(5)), (two, range(5, 10)))
        for i in part
        for j in part
        if i != j
    )
    assert found == pytest.approx(expected, rel=1e-10)
    assert gamma_out(FunctionClasses(fixed[:1], (one,))) == np.inf


@pytest.mark.parametrize(("m", "k"), [(32, 4), (128, 8), (512, 16)])
def test_gamma_out_of_a_random_fixed_part_has_the_stated_rate(m, k):
    """σ √k m^(−2/k) up to a constant, 2/√e = 1.21 for small balls; the least of m(m − 1)/2 distances √2 σ χ_k says
    which. Masks multiply by the root of the fixed share."""
    support = support_of(64, k)
    sigma, rate = 0.7, 0.7 * k**0.5 * m ** (-2 / k)
    found = [gamma_out(FunctionClasses(sigma * random(m, 64, seed=s), (support,))) for s in range(60)]
    least = chi2.ppf(1 - 0.5 ** (2 / (m * (m - 1))), k) ** 0.5
    assert np.median(found) == pytest.approx(2 * sigma * least, rel=0.15)
    ratio = np.array(found) / rate
    assert 1.2 <= np.mean(ratio) <= 2.8
    held = [
        gamma_out(FunctionClasses(sigma * random(m, 64, seed=s) * (random(m, 64, seed=999 + s) > 0), (support,))) / rate
        for s in range(60)
    ]
    assert np.mean(held) / np.mean(ratio) == pytest.approx(0.5**0.5, rel=0.15)


def test_gamma_in_is_the_least_move_of_an_input_swap():
    support = support_of(8, 3)
    fixed = random(20, 8, seed=1)
    moves = []
    for a in range(8):
        for b in range(a):
            swapped = fixed.clone()
            swapped[:, [a, b]] = fixed[:, [b, a]]
            moves.append(float((support.project(swapped) - support.project(fixed)).norm()))
    assert gamma_in(FunctionClasses(fixed, (support,))) == pytest.approx(min(moves), rel=1e-10)


def test_gamma_in_of_a_random_fixed_part():
    """√(2m) σ min ‖U_a − U_b‖ for many neurons."""
    support = support_of(10, 4)
    fixed = 0.3 * random(20000, 10, seed=1)
    u = support.U.numpy()
    least = min(np.linalg.norm(u[a] - u[b]) for a in range(10) for b in range(a))
    assert gamma_in(FunctionClasses(fixed, (support,))) == pytest.approx(0.3 * (2 * 20000) ** 0.5 * least, rel=0.02)


def test_gamma_in_leaves_out_dead_and_duplicate_inputs():
    x = random(300, 6, seed=0)
    x[:, 2] = 0  # dead
    x[:, 5] = x[:, 1]  # duplicate
    x[:, 4] = 0
    moments = InputMoments(6)
    moments.add(x)
    support = moments.support(0.999)
    fixed = random(9, 6, seed=1)
    u, f = support.U, fixed
    pairs = [(0, 1), (0, 3), (1, 3), (0, 5), (3, 5)]
    expected = min(float((u[a] - u[b]).norm() * (f[:, a] - f[:, b]).norm()) for a, b in pairs)
    assert gamma_in(FunctionClasses(fixed, (support,))) == pytest.approx(expected, rel=1e-8)


def test_embedding_classes_compare_frequent_tokens():
    counts = TokenCounts(9)
    counts.add(torch.tensor([0] * 5 + [3] * 4 + [7] * 3 + [8]))
    support = counts.support(0.9)
    assert support.k == 3
    fixed, weights = random(4, 9, seed=1), random(4, 9, seed=2)
    cost = FunctionClasses(fixed, (support,)).costs(weights)
    torch.testing.assert_close(cost[1, 2], (weights[2] - fixed[1])[[0, 3, 7]].square().sum())
    dense = Support(
        support.U, None, 3, support.variances, support.mean, support.total, False, support.rows
    )  # fmt: skip
    one, two = FunctionClasses(fixed, (support,)), FunctionClasses(fixed, (dense,))
    assert gamma_in(one) == pytest.approx(gamma_in(two)) and gamma_out(one) == pytest.approx(gamma_out(two))


def test_chunks_change_nothing(monkeypatch):
    support = support_of(10, 4)
    fixed, weights = random(30, 10, seed=1), random(30, 10, seed=2)
    scaling = masks(30, 10, 1.0, 3)
    scaling[20:] = scaling[0]
    for settings in ({}, {"free_scale": True}):
        whole = [FunctionClasses(fixed, (support,), s, **settings).costs(weights) for s in (None, scaling)]
        with monkeypatch.context() as m:
            m.setattr("mergeid.evidence.function_class.VALUES", 64)
            parts = [FunctionClasses(fixed, (support,), s, **settings).costs(weights) for s in (None, scaling)]
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_errors():
    support = support_of(5, 2)
    with pytest.raises(MergeidError, match="does not fit 1 groups"):
        FunctionClasses(torch.zeros(4, 6), (support,))
    with pytest.raises(MergeidError, match="excludes a row space"):
        FunctionClasses(torch.zeros(4, 5), (support,), torch.ones(4, 5), torch.ones(5, 1))
    with pytest.raises(MergeidError, match="row space has 4 rows"):
        FunctionClasses(torch.zeros(4, 5), (support,), row_space=torch.ones(4, 1))
    with pytest.raises(MergeidError, match="do not fit classes"):
        FunctionClasses(torch.zeros(4, 5), (support,)).costs(torch.zeros(3, 5))
