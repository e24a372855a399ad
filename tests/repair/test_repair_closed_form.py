"""The closed form beside a direct least-squares solution of the penalised problem."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeid.repair.closed_form import RIDGES, Moments, error, fit, ridge_solution
from mergeid.repair.few_rows import Gathered, fit_gathered


def problem(n: int, d: int, m: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) @ torch.randn(d, d, generator=g, dtype=torch.float64) + 3
    y = torch.randn(n, m, generator=g, dtype=torch.float64) - 1
    return x, y, torch.randn(m, d, generator=g, dtype=torch.float64)


def moments(x: torch.Tensor, y: torch.Tensor, parts: int = 1) -> Moments:
    found = Moments(x.shape[1], y.shape[1])
    for a, b in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
        found.add(a, b)
    return found


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(2, 40), st.integers(1, 7), st.integers(1, 5), st.sampled_from([1e-3, 0.1, 2.0]),
    st.booleans(), st.integers(1, 3),
)  # fmt: skip
def test_equals_least_squares(n: int, d: int, m: int, ridge: float, bias: bool, parts: int) -> None:
    """Stacked rows: the data, and sqrt(λ n) times the identity that pulls towards the average."""
    x, y, mean = problem(n, d, m, n * d + m)
    weight, b = ridge_solution(moments(x, y, parts), mean, ridge, bias=bias)
    inner = x - x.mean(0) if bias else x
    pull = np.sqrt(ridge * float(inner.square().sum()) / d)  # λ n, with λ = ρ tr(XᵀX / n) / d
    top = np.concatenate([x.numpy(), np.ones((n, 1))], 1) if bias else x.numpy()
    below = np.concatenate([pull * np.eye(d), np.zeros((d, 1))], 1) if bias else pull * np.eye(d)
    target = np.concatenate([y.numpy(), pull * mean.numpy().T])
    expected = np.linalg.lstsq(np.concatenate([top, below]), target, rcond=None)[0].T
    np.testing.assert_allclose(weight.numpy(), expected[:, :d], rtol=1e-10, atol=1e-10)
    if bias:
        assert b is not None
        np.testing.assert_allclose(b.numpy(), expected[:, d], rtol=1e-10, atol=1e-9)
    else:
        assert b is None


@pytest.mark.parametrize("bias", [True, False])
def test_error_is_that_of_the_rows(bias: bool) -> None:
    x, y, w = problem(30, 4, 3, 0)
    b = torch.randn(3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) if bias else None
    answer = x @ w.T + (b if b is not None else 0)
    spread = (y - y.mean(0) if bias else y).square().sum()
    assert error(moments(x, y, 4), w, b) == pytest.approx(float((answer - y).square().sum() / spread), rel=1e-10)


def test_sums_of_two_sets_are_those_of_all_rows() -> None:
    x, y, _ = problem(50, 6, 2, 3)
    together, whole = moments(x[:20], y[:20]) + moments(x[20:], y[20:], 3), moments(x, y)
    for centre in (True, False):
        a, b = together.about(centre), whole.about(centre)
        for u, v in ((a.xx, b.xx), (a.xy, b.xy), (a.x, b.x), (a.y, b.y)):
            torch.testing.assert_close(u, v, rtol=1e-12, atol=1e-11)
        assert a.yy == pytest.approx(b.yy, rel=1e-12)
    empty = Moments(6, 2)
    assert (empty + whole) is whole and (whole + empty) is whole


def test_offsets_lose_nothing_in_float32() -> None:
    """A mean a thousand times the spread."""
    x, y, mean = problem(400, 5, 3, 5)
    far = (x + 3000).float(), (y - 500).float()
    wide = far[0].double(), far[1].double()
    got, b = ridge_solution(moments(*far, parts=3), mean, 0.01, bias=True)
    expected, c = ridge_solution(moments(*wide, parts=3), mean, 0.01, bias=True)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert b is not None and c is not None


def test_where_nothing_can_be_learnt_the_average_stays() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(12, 10, generator=g, dtype=torch.float64)
    mean = torch.randn(3, 10, generator=g, dtype=torch.float64)
    found = fit(moments(x[:6], x[:6] @ mean.T), moments(x[6:], x[6:] @ mean.T), mean, None)
    assert found.ridge == inf and found.before == found.after and torch.equal(found.weight, mean)


def test_the_fit_recovers_a_layer_from_clean_answers() -> None:
    x, _, w = problem(200, 6, 4, 2)
    y = x @ w.T + 5
    found = fit(moments(x[::2], y[::2]), moments(x[1::2], y[1::2]), torch.zeros_like(w), torch.zeros(4))
    assert found.after < 1e-4 * found.before and found.bias is not None
    torch.testing.assert_close(x @ found.weight.T + found.bias, y, rtol=0.05, atol=0.3)


def test_constant_inputs_move_the_bias_alone() -> None:
    x, y, mean = torch.ones(20, 3, dtype=torch.float64), torch.full((20, 2), 7.0, dtype=torch.float64), torch.ones(2, 3)
    weight, b = ridge_solution(moments(x, y), mean, 0.1, bias=True)
    assert torch.equal(weight, mean.double()) and b is not None
    torch.testing.assert_close(b, torch.full((2,), 4.0, dtype=torch.float64))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(4, 12), st.integers(1, 6), st.integers(1, 5), st.booleans(), st.booleans(), st.booleans())
def test_few_rows_give_what_their_moments_give(d: int, n: int, m: int, bias: bool, free: bool, constant: bool) -> None:
    """More inputs than rows: the small form and the large one solve the same problem, and choose the same ridge."""
    x, y, mean = problem(2 * n, d, m, n * d + m)
    if constant:
        x = torch.ones_like(x)
    y = y + 0.5 * x @ problem(1, d, m, 9)[2].T
    b = torch.arange(m, dtype=torch.float64) if bias else None
    seen, unseen = Gathered(d, m), Gathered(d, m)
    for k in range(n):
        seen.add(x[k : k + 1], y[k : k + 1])
        unseen.add(x[n + k : n + k + 1], y[n + k : n + k + 1])
    assert (seen.rows is None) == (n > d)
    sums = [moments(x[:n], y[:n]), moments(x[n:], y[n:])]
    if free:
        sums = [s.centred() for s in sums]
    got, expected = fit_gathered(seen, unseen, mean, b, free=free), fit(sums[0], sums[1], mean, b)
    assert got.ridge == expected.ridge
    assert got.before == pytest.approx(expected.before, rel=1e-9, abs=1e-12)
    assert got.after == pytest.approx(expected.after, rel=1e-7, abs=1e-9)
    torch.testing.assert_close(got.weight, expected.weight, rtol=1e-7, atol=1e-7)
    if bias:
        torch.testing.assert_close(got.bias, expected.bias, rtol=1e-7, atol=1e-6)


def test_rows_are_added_up_once_they_are_more_than_the_inputs() -> None:
    x, y, mean = problem(60, 6, 2, 4)
    seen, unseen = Gathered(6, 2), Gathered(6, 2)
    for k in range(0, 40, 5):
        seen.add(x[k : k + 5], y[k : k + 5])
    unseen.add(x[40:], y[40:])
    assert seen.rows is None
    got, expected = (
        fit_gathered(seen, unseen, mean, None),
        fit(moments(x[:40], y[:40]), moments(x[40:], y[40:]), mean, None),
    )
    assert got.ridge == expected.ridge
    torch.testing.assert_close(got.weight, expected.weight, rtol=1e-9, atol=1e-9)


def test_the_ridge_of_wide_layers_is_chosen_on_some_outputs_and_judged_on_all() -> None:
    x, _, w = problem(300, 8, 600, 6)
    y = x @ w.T + torch.randn(300, 600, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = fit(moments(x[::2], y[::2]), moments(x[1::2], y[1::2]), torch.zeros_like(w), None)
    each = [
        error(
            moments(x[1::2], y[1::2]),
            ridge_solution(moments(x[::2], y[::2]), torch.zeros_like(w), r, bias=False)[0],
            None,
        )
        for r in RIDGES
    ]
    assert found.after == pytest.approx(min(each), rel=0.02) and found.after in [pytest.approx(e) for e in each]
