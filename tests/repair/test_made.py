"""Weights that a network computes with operations in place are computed again as it computes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mergeid.repair.made import Derived
from mergeid.repair.paced import Stop, _Watch
from mergeid.repair.solve import solve_network

Make = Callable[[Tensor], Tensor]


def relu_in_place(w: Tensor) -> Tensor:
    return (w - 0.1).relu_()


def twice_in_place(w: Tensor) -> Tensor:
    return (w * 2).add_(1).tanh_()


def filled_where_masked(w: Tensor) -> Tensor:
    return (w * 2).masked_fill_(torch.eye(5, 4).bool(), 0.3)


def in_place_with_itself(w: Tensor) -> Tensor:
    made = w + 1
    return made.mul_(made)


def used_before_and_after(w: Tensor) -> Tensor:
    made = w + 1
    before = made.exp()
    return before + made.mul_(3)


def part_in_place(w: Tensor) -> Tensor:
    made = w + 1
    made[1:3].mul_(5)
    return made


def seen_after_the_whole_is_written(w: Tensor) -> Tensor:
    made = w + 1
    part = made[:, 1]
    made.mul_(2)
    return made + part[:, None]


def transposed_in_place(w: Tensor) -> Tensor:
    made = w + 1
    made.t()[2].sub_(4).abs_()
    return made


def into_zeros(w: Tensor) -> Tensor:
    made = torch.zeros(5, 4)
    made[:, :2] = w[:, 2:]
    made[1:, 3] += w[1:, 0]
    return made


def into_a_constant_with_values(w: Tensor) -> Tensor:
    made = torch.arange(20.0).reshape(5, 4)
    seen = made[2:4]
    made[2] = w[1]
    return made.add_(w) + seen.sum()


def into_what_is_named(w: Tensor) -> Tensor:
    made = torch.empty(5, 4)
    torch.mul(w, 3.0, out=made)
    return made


def by_index(w: Tensor) -> Tensor:
    made = w.clone()
    made[torch.tensor([0, 2]), torch.tensor([1, 3])] = w[4, :2] * 7
    return made


def through_a_split(w: Tensor) -> Tensor:
    first, second = (w + 1).split(2, dim=1)
    first.mul_(second)
    return torch.cat([first, second], 1)


def many_at_once(w: Tensor) -> Tensor:
    made = [w + 1, w + 2]
    torch._foreach_mul_(made, 3.0)
    return made[0] * made[1]


PROGRAMS = [
    relu_in_place,
    twice_in_place,
    filled_where_masked,
    in_place_with_itself,
    used_before_and_after,
    part_in_place,
    seen_after_the_whole_is_written,
    transposed_in_place,
    into_zeros,
    into_a_constant_with_values,
    into_what_is_named,
    by_index,
    through_a_split,
    many_at_once,
]


class Computed(nn.Module):
    def __init__(self, make: Make, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)))
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.make(self.weight).t()


def derived_of(net: Computed, x: Tensor) -> Derived:
    found = []

    def meet(stop: Stop) -> Tensor:
        found.extend(stop.derived.values())
        answer: Tensor = stop.func(*stop.args, **stop.kwargs)
        return answer

    with torch.no_grad(), _Watch(net, {"x": x}, meet):
        net(x)
    (derived,) = found
    return derived


@pytest.mark.parametrize("make", PROGRAMS)
def test_what_was_written_in_place_is_computed_again_from_other_weights(make: Make) -> None:
    net, other = Computed(make, 0), torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    remake = derived_of(net, torch.ones(2, 4)).remake
    value = other.double().requires_grad_()
    with torch.no_grad():
        assert torch.allclose(remake({"weight": net.weight.detach()}), make(net.weight).t())
        assert torch.allclose(remake({"weight": other}), make(other).t())
    remake({"weight": value}).square().sum().backward()
    step = 1e-5 * torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        high, low = (remake({"weight": value + sign * step}).square().sum() for sign in (1, -1))
    assert value.grad is not None
    assert torch.isclose((value.grad * step).sum(), (high - low) / 2, rtol=1e-3)


@pytest.mark.parametrize("make", PROGRAMS)
def test_layers_with_such_weights_are_solved(make: Make) -> None:
    a, b = Computed(make, 0), Computed(make, 1)
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(3))
    merged = Computed(make, 0)
    with torch.no_grad():
        merged.weight.copy_((a.weight + b.weight) / 2)
        aim, before = (a(x) + b(x)) / 2, merged(x)
    solve_network(merged, [a, b], [0.5, 0.5], lambda n, batch: n(batch["x"]), [{"x": x}])
    with torch.no_grad():
        assert (merged(x) - aim).norm() <= (before - aim).norm() * 1.001
