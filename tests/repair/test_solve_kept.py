"""Solving networks that keep what they once computed of their weights, and that execute what their inputs ask for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergeid
from mergeid.repair.orders import outers
from mergeid.repair.paced import record
from mergeid.repair.solve import solve_network

L = 5


def forward(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    said: Tensor = model(batch["x"])
    return said


class Keeping(nn.Module):
    """Adds a table by distance, which is laid out once in eval mode and forgotten in training mode."""

    def __init__(self, seed: int, keeps: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 3)
        self.table = nn.Parameter(torch.randn(L, 6))
        self.register_buffer("at", torch.arange(L).flip(0), persistent=False)
        self.kept: dict[str, Tensor] = {}
        self.keeps = keeps

    def train(self, mode: bool = True) -> Keeping:
        super().train(mode)
        if mode:
            self.kept = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        laid = self.kept.get("it", None)
        if laid is None:
            laid = self.table[self.at]
        if self.keeps and not self.training:
            self.kept["it"] = laid
        said: Tensor = self.b((self.a(x) + laid).tanh())
        return said


X = torch.randn(96, L, 8, generator=torch.Generator().manual_seed(3))


def test_what_was_kept_makes_no_difference() -> None:
    solved = []
    for keeps in (False, True):
        a, b = Keeping(0, keeps).eval(), Keeping(1, keeps).eval()
        with torch.no_grad():
            net = copy.deepcopy(a)
            b(X)  # as a verb has run it before
            for p, q in zip(net.parameters(), b.parameters(), strict=True):
                p.copy_((p + q) / 2)
        done = solve_network(net, [a, b], [0.5, 0.5], forward, [{"x": x} for x in X.split(32)])
        assert {"a.weight", "b.weight"} <= {name for layer in done for name in layer.weights}
        solved.append(net.state_dict())
    for name, value in solved[0].items():
        torch.testing.assert_close(solved[1][name], value, rtol=0, atol=0)


@pytest.mark.parametrize("repair", ["solve", "solve+polish"])
def test_a_merge_of_networks_that_keep_is_solved(repair: str) -> None:
    a, b = Keeping(0).eval(), Keeping(1).eval()
    made = mergeid.merge(
        a, b, data=[{"x": x} for x in X], example_inputs={"x": X[:2]}, match="never", repair=repair, force=True
    )
    net = Keeping(2)
    net.load_state_dict(made.state)
    with torch.no_grad():
        mean = (a(X) + b(X)) / 2
        for p, q, r in zip(net.eval().parameters(), a.parameters(), b.parameters(), strict=True):
            assert p.isfinite().all() and p.shape == q.shape == r.shape
        plain = copy.deepcopy(a.train()).eval()
        for p, q in zip(plain.parameters(), b.parameters(), strict=True):
            p.copy_((p + q) / 2)
        assert (net(X) - mean).square().mean() < 0.5 * (plain(X) - mean).square().mean()


class Rare(nn.Module):
    """Has a layer that only some inputs ask for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.rare, self.b = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if bool((x > 50).any()):
            h = self.rare(h)
        said: Tensor = self.b(h.transpose(0, 1)).transpose(0, 1)
        return said


def test_where_the_examples_lie_where_few_do_not_execute_everything() -> None:
    x = X.clone()
    x[70] *= 1000
    net, batch = Rare().eval(), {"x": x}
    wanted = record(net, forward, batch).stops
    assert [next(iter(stop.weights.values())).split(".")[0] for stop in wanted[:3]] == ["a", "rare", "b"]
    found = outers(net, forward, batch, wanted)
    assert [found[stop.index] for stop in wanted[:3]] == [1, 1, L]
