"""Examples whose tensors lie inside of other containers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergeid
from mergeid.repair.solve import solve_network


class Nested(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, inp: dict[str, Any]) -> Tensor:
        said: Tensor = self.b((self.a(inp["x"]) + inp["more"][0]).relu())
        return said


G = torch.Generator().manual_seed(0)
X, MORE = torch.randn(96, 6, generator=G), torch.randn(96, 16, generator=G)


def test_nested_examples_are_solved_as_flat_ones() -> None:
    """With batches of unequal sizes, whose shapes differ inside of the containers alone."""
    a, b = Nested(0).eval(), Nested(1).eval()
    parts = [(X[:40], MORE[:40]), (X[40:], MORE[40:])]
    results = []
    for batches, forward in (
        ([{"inp": {"x": x, "more": [m]}} for x, m in parts], lambda net, batch: net(batch["inp"])),
        ([{"x": x, "m": m} for x, m in parts], lambda net, batch: net({"x": batch["x"], "more": [batch["m"]]})),
    ):
        net = copy.deepcopy(a)
        done = solve_network(net, [a, b], [0.5, 0.5], forward, batches)
        assert len(done) == 2
        results.append(net.state_dict())
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name])
        assert not torch.equal(value, a.state_dict()[name])


class Flat(Nested):
    def forward(self, x: Tensor, more: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward({"x": x, "more": [more]})


@pytest.mark.parametrize("repair", ["auto", "solve"])
def test_a_merge_with_nested_examples_is_the_one_with_flat_ones(repair: str) -> None:
    nested = [{"inp": {"x": x, "more": [m]}} for x, m in zip(X, MORE, strict=True)]
    flat = [{"x": x, "more": m} for x, m in zip(X, MORE, strict=True)]
    one = {"inp": {"x": X[:2], "more": [MORE[:2]]}}
    other = {"x": X[:2], "more": MORE[:2]}
    made = mergeid.merge(Nested(0), Nested(1), data=nested, example_inputs=one, force=True, repair=repair)
    same = mergeid.merge(Flat(0), Flat(1), data=flat, example_inputs=other, force=True, repair=repair)
    assert made.comparison is not None and same.comparison is not None
    assert made.comparison["distances"] == pytest.approx(same.comparison["distances"])
    assert made.state is not None and same.state is not None
    for name, value in same.state.items():
        torch.testing.assert_close(made.state[name], value)
