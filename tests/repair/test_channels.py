"""Scales and shifts of single channels, and parameters behind a computed weight, beside direct least squares."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
import torch
from torch import Tensor

from mergeid.repair.channels import ChannelMoments, channel_solution, fit_channels
from mergeid.repair.closed_form import RIDGES, Moments, ridge_solution
from mergeid.repair.derived import fit_derived
from mergeid.repair.layers import Part
from mergeid.repair.made import Derived


def rows(n: int, m: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, m, generator=g, dtype=torch.float64) * torch.arange(1, m + 1) + 2
    return x, 0.7 * x - 3 + 0.5 * torch.randn(n, m, generator=g, dtype=torch.float64)


def moments(x: Tensor, y: Tensor, parts: int = 1) -> ChannelMoments:
    found = ChannelMoments(x.shape[1])
    for a, b in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
        found.add(a, b)
    return found


def least_squares(x: Tensor, y: Tensor, mean: Tensor, ridge: float, shifted: bool) -> tuple[Tensor, Tensor | None]:
    """Channel by channel, with a row that pulls the scale towards the mean's."""
    inner = x - x.mean(0) if shifted else x
    pull = float(np.sqrt(ridge * inner.square().mean(0).mean() * len(x)))
    answers = []
    for j in range(x.shape[1]):
        columns = [x[:, j], torch.ones(len(x), dtype=torch.float64)][: 1 + shifted]
        row = torch.tensor([pull, 0.0][: 1 + shifted], dtype=torch.float64)
        system = torch.cat([torch.stack(columns, 1), row[None]])
        target = torch.cat([y[:, j], pull * mean[j : j + 1]])
        answers.append(torch.linalg.lstsq(system, target[:, None], driver="gelsd").solution[:, 0])
    found = torch.stack(answers)
    return found[:, 0], found[:, 1] if shifted else None


def error(x: Tensor, y: Tensor, scale: Tensor, shift: Tensor | None) -> float:
    answer = scale * x + (0 if shift is None else shift)
    spread = y if shift is None else y - y.mean(0)
    return float((answer - y).square().sum() / spread.square().sum())


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("ridge", [1e-3, 0.1, 3.0])
def test_channels_are_solved_as_least_squares_are(ridge: float, shifted: bool) -> None:
    x, y = rows(40, 5, 0)
    mean = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scale, shift = channel_solution(moments(x, y, 3), mean, ridge, shifted=shifted)
    expected, b = least_squares(x, y, mean, ridge, shifted)
    torch.testing.assert_close(scale, expected, rtol=1e-9, atol=1e-9)
    assert (shift is None) == (b is None) == (not shifted)
    if shift is not None and b is not None:
        torch.testing.assert_close(shift, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shifted", [True, False])
def test_error_of_channels_is_that_of_the_rows(shifted: bool) -> None:
    x, y = rows(31, 4, 2)
    scale = torch.tensor([0.5, 1.0, -2.0, 0.0], dtype=torch.float64)
    shift = torch.tensor([1.0, 0.0, 3.0, -1.0], dtype=torch.float64) if shifted else None
    both = moments(x[:10], y[:10]) + moments(x[10:], y[10:], 2)
    assert both.error(scale, shift) == pytest.approx(error(x, y, scale, shift), rel=1e-9)
    assert both.count == len(x)


def test_one_row_counts_once() -> None:
    x, y = torch.tensor([[2.0, -1.0]]).double(), torch.tensor([[5.0, 3.0]]).double()
    scale = torch.tensor([2.0, 1.0]).double()
    assert moments(x, y).error(scale, None) == pytest.approx(error(x, y, scale, None))


def test_nothing_is_known_of_channels_that_nothing_runs_through() -> None:
    nothing = torch.zeros(8, 2, dtype=torch.float64)
    mean = torch.tensor([2.0, -1.0], dtype=torch.float64)
    scale, shift = channel_solution(moments(nothing, nothing + 5), mean, 0.1, shifted=True)
    assert torch.equal(scale, mean) and shift is not None and shift.tolist() == [5.0, 5.0]


@pytest.mark.parametrize("shifted", [True, False])
def test_the_ridge_is_the_best_on_unseen_rows(shifted: bool) -> None:
    (x, y), (u, v) = rows(6, 3, 3), rows(200, 3, 4)
    mean, b = torch.full((3,), 0.2, dtype=torch.float64), torch.full((3,), -2.0, dtype=torch.float64)
    start = b if shifted else None
    found = fit_channels(moments(x, y), moments(u, v), mean, start)
    tried = {ridge: error(u, v, *least_squares(x, y, mean, ridge, shifted)) for ridge in RIDGES}
    best = min(tried, key=lambda ridge: tried[ridge])
    assert found.before == pytest.approx(error(u, v, mean, start), rel=1e-9)
    assert found.ridge == best and found.after == pytest.approx(tried[best], rel=1e-7) and tried[best] < found.before
    both = torch.cat([x, u]), torch.cat([y, v])
    torch.testing.assert_close(found.weight, least_squares(*both, mean, best, shifted)[0], rtol=1e-8, atol=1e-9)


def test_what_is_best_already_stays() -> None:
    x, y = rows(50, 3, 5)
    mean, b = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    found = fit_channels(moments(x, y), moments(x, x), mean, b)  # the unseen rows are answered exactly as they are
    assert found.ridge == inf and found.before == found.after == 0
    assert torch.equal(found.weight, mean) and found.bias is not None and torch.equal(found.bias, b)


def part(leaves: dict[str, Tensor], remake: object, bias: Tensor | None) -> Part:
    made = Derived(leaves, remake)  # type: ignore[arg-type]
    return Part(made.remake(leaves), bias, derived=made)


def matrices(seed: int) -> tuple[Moments, Moments, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(300, 4, generator=g, dtype=torch.float64) + 1, torch.randn(3, 4, generator=g).double()
    y = x @ w.T + 2 + 0.1 * torch.randn(300, 3, generator=g, dtype=torch.float64)
    halves = []
    for k in range(2):
        halves.append(Moments(4, 3))
        halves[k].add(x[k::2], y[k::2])
    return halves[0], halves[1], w + 0.3 * torch.randn(3, 4, generator=g, dtype=torch.float64), torch.zeros(3).double()


@pytest.mark.parametrize("shifted", [True, False])
def test_a_weight_that_is_its_parameter_is_found_as_in_closed_form(shifted: bool) -> None:
    seen, unseen, start, zero = matrices(0)
    found = fit_derived(seen, unseen, part({"w": start}, lambda v: v["w"], zero if shifted else None))
    weight, b = ridge_solution(seen + unseen, start, found.ridge, bias=shifted)
    assert found.ridge in RIDGES and found.after < found.before
    torch.testing.assert_close(found.weight, weight, rtol=1e-4, atol=1e-4)
    assert (found.bias is None) == (b is None)
    if found.bias is not None and b is not None:
        torch.testing.assert_close(found.bias, b, rtol=1e-3, atol=1e-3)


def test_a_normed_weight_is_found_through_its_parameters() -> None:
    seen, unseen, start, zero = matrices(1)

    def remake(v: dict[str, Tensor]) -> Tensor:
        return v["g"] * v["v"] / v["v"].norm(dim=1, keepdim=True)

    leaves = {"v": 3 * start, "g": start.norm(dim=1, keepdim=True)}
    found = fit_derived(seen, unseen, part(leaves, remake, zero))
    torch.testing.assert_close(found.weight, remake(dict(found.leaves)))
    whole, _ = ridge_solution(seen + unseen, start, found.ridge, bias=True)  # a norm and a direction are any matrix
    torch.testing.assert_close(found.weight, whole, rtol=2e-3, atol=2e-3)
    assert found.after < found.before


def test_scales_that_are_computed_are_found_channel_by_channel() -> None:
    (x, y), (u, v) = rows(60, 3, 6), rows(60, 3, 7)
    mean, b = torch.full((3,), 0.2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    made = Derived({"gain": mean - 1}, lambda values: values["gain"] + 1)
    seen, unseen = moments(x, y), moments(u, v)
    found = fit_derived(seen, unseen, Part(mean, b, alone=True, derived=made))
    expected, shift = channel_solution(seen + unseen, mean, found.ridge, shifted=True)
    torch.testing.assert_close(found.weight, expected, rtol=1e-4, atol=1e-4)
    assert found.bias is not None and shift is not None
    torch.testing.assert_close(found.bias, shift, rtol=1e-3, atol=1e-3)


def test_a_weight_that_answers_best_already_stays() -> None:
    seen, unseen, start, _ = matrices(2)
    weight, b = ridge_solution(unseen, start, 1e-12, bias=True)
    found = fit_derived(seen, unseen, part({"w": weight}, lambda v: v["w"], b))
    assert found.ridge == inf and found.before == found.after
    assert torch.equal(found.weight, weight) and torch.equal(found.leaves["w"], weight)
