"""ReLU and ridge costs against SciPy's generic solvers, and the inequalities that projected inputs promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import qr
from scipy.optimize import minimize

from mergeid.errors import MergeidError
from mergeid.evidence.activation_cost import linear_ridge_costs, problem, relu_cost, relu_costs, ridge_cost
from mergeid.evidence.function_class import FunctionClasses
from mergeid.evidence.support import InputMoments


def random(*shape, seed):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def setting(m, d, k, rows, *, share=1.0, centred=False, seed=0, noise=0.3):
    """Inputs near a k-dimensional subspace, with their support of dimension k, and classes over it."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((d, k)))[0]
    x = torch.from_numpy(rng.standard_normal((rows, k)) @ basis.T + noise * rng.standard_normal((rows, d)))
    x = x + (0.5 if centred else 0.0)
    moments = InputMoments(d)
    moments.add(x)
    support = moments.support(centred=centred).with_k(k)
    scaling = None
    if share < 1:
        scaling = torch.from_numpy((rng.random((m, d)) < share).astype(float))
    fixed = torch.from_numpy(rng.standard_normal((m, d)))
    trained = torch.from_numpy(rng.standard_normal((m, d)))
    weights = fixed + (trained if scaling is None else scaling * trained)
    return FunctionClasses(fixed, (support,), scaling), weights, x


def by_slsqp(x, fixed, scaling, target, bias=None):
    """The quadratic programme as it is written, for a generic solver."""
    d = x.shape[1]
    pre = x @ target + (0 if bias is None else bias)
    on = pre > 1e-9 * np.abs(pre).max()
    extra = bias is not None

    def own(z):
        return x @ (fixed + scaling * z[:d]) + (z[d] if extra else 0)

    slope = np.column_stack([x * scaling, np.ones(len(x))]) if extra else x * scaling
    constraints = []
    if on.any():
        # SLSQP stops short of the optimum when equations repeat each other: give it independent ones
        _, triangle, order = qr(slope[on].T, pivoting=True, mode="economic")
        pivots = np.abs(triangle.diagonal())
        rows = np.flatnonzero(on)[order[: int((pivots > 1e-10 * pivots[0]).sum())]]
        constraints.append({"type": "eq", "fun": lambda z: (own(z) - pre)[rows], "jac": lambda z: slope[rows]})
    if (~on).any():
        constraints.append({"type": "ineq", "fun": lambda z: -own(z)[~on], "jac": lambda z: -slope[~on]})
    found = minimize(
        lambda z: z[:d] @ z[:d],
        np.zeros(d + extra),
        jac=lambda z: np.concatenate([2 * z[:d], np.zeros(int(extra))]),
        constraints=constraints,
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-13},
    )
    return found.fun if found.success else None


@pytest.mark.parametrize("share", [1.0, 0.8])
@pytest.mark.parametrize("centred", [False, True])
def test_quadratic_programme_equals_a_generic_solver(share, centred):
    m, d, k, rows = 4, 7, 4, 7
    compared = below = 0
    for seed in range(6):
        classes, weights, x = setting(m, d, k, rows, share=share, centred=centred, seed=seed)
        bias = random(m, seed=100 + seed) if centred else None
        linear = classes.costs(weights)
        found = relu_costs(classes, weights, x, bias=bias)
        assert (found <= linear * (1 + 1e-9)).all()
        seen = classes.supports[0].onto(x).numpy()
        scaling = np.ones((m, d)) if classes.scaling is None else classes.scaling.numpy()
        for i in range(m):
            for j in range(m):
                value = by_slsqp(
                    seen,
                    classes.fixed[i].numpy(),
                    scaling[i],
                    weights[j].numpy(),
                    None if bias is None else float(bias[j]),
                )
                if value is None:
                    continue  # the generic solver gave up
                compared += 1
                below += float(found[i, j]) < 0.9 * float(linear[i, j])
                assert float(found[i, j]) == pytest.approx(value, rel=2e-4, abs=1e-6)
    assert compared > 70 and below > 10


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 60),
    share=st.sampled_from([1.0, 0.7]),
    centred=st.booleans(),
)
def test_projected_costs_are_at_most_the_linear_ones_and_feasible(seed, rows, share, centred):
    m, d, k = 3, 8, 3
    classes, weights, x = setting(m, d, k, 80, share=share, centred=centred, seed=seed)
    x = x[:rows]
    linear = classes.costs(weights)
    bias = random(m, seed=seed) if centred else None
    found = relu_costs(classes, weights, x, bias=bias)
    assert (found <= linear * (1 + 1e-9)).all() and (found >= 0).all()
    for i in range(m):
        # without the upper bound the programme itself must find as much
        for j in range(m):
            if torch.isfinite(linear[i, j]):
                alone = relu_cost(problem(classes, weights, x, i, j, bias=bias))
                assert alone == pytest.approx(float(found[i, j]), rel=1e-6, abs=1e-9)


def test_equal_where_the_active_inputs_span_the_support():
    classes, weights, x = setting(4, 10, 3, 200, share=0.8)
    torch.testing.assert_close(relu_costs(classes, weights, x), classes.costs(weights), rtol=1e-9, atol=0)


def test_own_function_costs_at_most_the_trained_norm():
    classes, weights, x = setting(5, 9, 4, 8, seed=3)
    own = relu_costs(classes, weights, x, pairs=[(i, i) for i in range(5)])
    trained = (weights - classes.fixed).square().sum(1)
    assert (own.diagonal() <= trained).all() and torch.isnan(own[0, 1])


def test_raw_inputs_break_the_inequality():
    """Inputs with parts off the support: dearer than the linear cost, or not feasible at all."""
    dearer = infeasible = 0
    for seed in range(5):
        classes, weights, x = setting(3, 8, 3, 40, share=0.7, seed=seed)
        linear, raw = classes.costs(weights), relu_costs(classes, weights, x, raw=True)
        off = ~torch.eye(3, dtype=torch.bool)
        dearer += int((torch.isfinite(raw) & (raw > linear * 1.001) & off).sum())
        infeasible += int((torch.isinf(raw) & torch.isfinite(linear) & off).sum())
        # its own function neuron i reaches on any inputs
        assert torch.isfinite(raw.diagonal()).all()
    assert dearer + infeasible > 15 and infeasible > 0
    classes, weights, x = setting(3, 8, 3, 5, seed=9)
    raw = relu_costs(classes, weights, x, raw=True)
    value = by_slsqp(x.numpy(), classes.fixed[0].numpy(), np.ones(8), weights[1].numpy())
    assert float(raw[0, 1]) == pytest.approx(value, rel=1e-4)


def test_many_inactive_inputs_are_few_constraints():
    """The working set finds the same optimum as all inequalities at once."""
    classes, weights, x = setting(2, 12, 8, 3000, seed=4)
    p = problem(classes, weights, x, 0, 1)
    pre = p.pre_activation
    on = np.flatnonzero(pre > 0)[:3]
    few = np.concatenate([on, np.flatnonzero(pre <= 0)])
    p = problem(classes, weights, x[torch.from_numpy(few)], 0, 1)
    found = relu_cost(p)
    # the optimality conditions of min ‖w‖²: w is a combination of equality rows, and of tight inequalities with
    # multipliers of one sign; here the dual bound says it without knowing which
    lower = minimize_dual(p)
    assert found == pytest.approx(lower, rel=1e-4)


def minimize_dual(p):
    """max over multipliers of the Lagrange dual of min ‖w‖²: a lower bound, by L-BFGS-B."""
    pre, rows = p.pre_activation, p.inputs @ p.map
    on = pre > 0
    rhs = np.where(on, pre, 0.0) - p.inputs @ p.centre

    def negative(y):
        w = rows.T @ y
        return 0.25 * w @ w - y @ rhs, 0.5 * rows @ w - rhs

    # equality: any multiplier; rows·w ≤ rhs: a multiplier that is not positive
    bounds = [(None, None) if o else (None, 0) for o in on]
    found = minimize(
        negative,
        np.zeros(len(on)),
        jac=True,
        bounds=bounds,
        method="L-BFGS-B",
        options={"maxiter": 20000, "maxfun": 40000, "ftol": 1e-15, "gtol": 1e-10},
    )
    return -found.fun


def test_silent_neurons():
    classes, weights, x = setting(2, 6, 3, 20, centred=True)
    low = torch.full((2,), -100.0)
    assert (relu_costs(classes, weights, x, bias=low) == 0).all()  # a bias does it
    plain, weights, x = setting(2, 6, 3, 20)
    positive = x * torch.sign(x @ weights[1])[:, None]
    found = float(relu_costs(plain, weights, -positive, pairs=[(0, 1)])[0, 1])
    seen = plain.supports[0].onto(-positive).numpy()
    assert found == pytest.approx(
        by_slsqp(seen, plain.fixed[0].numpy(), np.ones(6), weights[1].numpy()), rel=1e-4, abs=1e-7
    )


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_linear_ridge_is_the_minimum(share):
    """Against the normal equations of the whole problem in w, on the data themselves."""
    classes, weights, x = setting(4, 8, 4, 300, share=share, seed=2)
    seen = classes.supports[0].onto(x)
    scaling = torch.ones(4, 8, dtype=torch.float64) if classes.scaling is None else classes.scaling
    for rho in (1e-3, 0.5, 20.0):
        cost = linear_ridge_costs(classes, weights, rho)
        for i in range(4):
            for j in range(4):
                a = torch.cat([seen * scaling[i] / (rho * len(x)) ** 0.5, torch.eye(8)])
                b = torch.cat([seen @ (weights[j] - classes.fixed[i]) / (rho * len(x)) ** 0.5, torch.zeros(8)])
                w = torch.linalg.lstsq(a, b[:, None]).solution[:, 0]
                torch.testing.assert_close(cost[i, j], (a @ w - b).square().sum(), rtol=1e-7, atol=1e-9)
        if share == 1.0:
            assert (cost <= classes.costs(weights)).all()


def test_linear_ridge_formula_with_the_inverse_variances():
    """bᵀ (S + ρ Λ⁻¹)⁻¹ b, and bᵀ Σ (Σ + ρ)⁻¹ b on all directions for D = 1; tends to C as ρ → 0."""
    classes, weights, x = setting(3, 6, 4, 200, share=0.8, seed=5)
    support = classes.supports[0]
    u, rho = support.U.numpy(), 0.3
    cost = linear_ridge_costs(classes, weights, rho).numpy()
    for i in range(3):
        m = u.T * classes.scaling[i].numpy()
        for j in range(3):
            b = u.T @ (weights[j] - classes.fixed[i]).numpy()
            expected = b @ np.linalg.solve(m @ m.T + rho * np.diag(1 / support.variances[:4].numpy()), b)
            assert cost[i, j] == pytest.approx(expected, rel=1e-9)
    limit, linear = linear_ridge_costs(classes, weights, 1e-10).numpy(), classes.costs(weights).numpy()
    reached = np.isfinite(linear)
    np.testing.assert_allclose(limit[reached], linear[reached], rtol=1e-5)
    assert 0 < (~reached).sum() < 9 and (limit[~reached] > 1e8).all()  # grows as 1/ρ
    whole = FunctionClasses(classes.fixed, (support.with_k(6),))
    sigma = (x.T @ x / len(x)).numpy()
    b = (weights[2] - classes.fixed[1]).numpy()
    expected = b @ sigma @ np.linalg.solve(sigma + rho * np.eye(6), b)
    assert float(linear_ridge_costs(whole, weights, rho)[1, 2]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("activation", [torch.relu, torch.nn.functional.gelu, torch.tanh], ids=["relu", "gelu", "tanh"])
@pytest.mark.parametrize("centred", [False, True])
def test_ridge_of_any_activation(activation, centred):
    """Never above the linear cost, and no better found by a generic solver from many starts."""
    classes, weights, x = setting(3, 5, 3, 30, share=0.9, centred=centred, seed=1)
    bias = random(3, seed=8) if centred else None
    linear = classes.costs(weights)
    rng = np.random.default_rng(0)
    for i, j in [(0, 1), (2, 2)]:
        p = problem(classes, weights, x, i, j, bias=bias)
        rho = 0.05
        found = ridge_cost(p, activation, rho)
        assert found <= float(linear[i, j]) * (1 + 1e-9)
        goal = activation(torch.from_numpy(p.pre_activation))
        features, fixed = torch.from_numpy(p.inputs @ p.map), torch.from_numpy(p.inputs @ p.centre)

        def objective(z, features=features, fixed=fixed, goal=goal):
            w, c = torch.from_numpy(z[:5]), float(z[5]) if centred else 0.0
            out = activation(fixed + features @ w + c)
            return float((out - goal).square().mean() / 0.05 + w.square().sum())

        others = [
            minimize(objective, scale * rng.standard_normal(5 + centred), method="L-BFGS-B").fun
            for scale in (0.1, 1, 3)
        ]
        assert found <= min(others) * 1.02 + 1e-6


def test_ridge_of_the_identity_is_the_closed_form():
    classes, weights, x = setting(3, 6, 4, 150, share=0.8, seed=6)
    closed = linear_ridge_costs(classes, weights, 0.2)
    for i, j in [(0, 1), (1, 1), (2, 0)]:
        value = ridge_cost(problem(classes, weights, x, i, j), lambda t: t, 0.2)
        assert value == pytest.approx(float(closed[i, j]), rel=1e-6)


def test_groups_and_errors():
    classes, weights, x = setting(2, 6, 3, 30)
    two = FunctionClasses(
        torch.cat([classes.fixed, classes.fixed]), (classes.supports[0], classes.supports[0]), classes.scaling
    )
    both = torch.cat([weights, weights])
    found = relu_costs(two, both, torch.stack([x, x], 1))
    alone = relu_costs(classes, weights, x)
    torch.testing.assert_close(found[2:, 2:], alone)
    assert torch.isinf(found[:2, 2:]).all()
    assert torch.isinf(linear_ridge_costs(two, both, 1.0)[:2, 2:]).all()
    with pytest.raises(MergeidError, match="different groups"):
        problem(two, both, x, 0, 3)
    with pytest.raises(MergeidError, match="centred support"):
        problem(classes, weights, x, 0, 1, bias=torch.zeros(2))
    with pytest.raises(MergeidError, match="must be positive"):
        linear_ridge_costs(classes, weights, 0.0)
    with pytest.raises(MergeidError, match="must be positive"):
        ridge_cost(problem(classes, weights, x, 0, 1), torch.tanh, -1.0)
