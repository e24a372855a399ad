"""Layers that do not have the examples in the first dimension: whose rows are whose."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mergeid.repair.orders import outers
from mergeid.repair.paced import record
from mergeid.repair.solve import SolvedLayer, solve_network

N, L, H, D = 64, 6, 2, 4
G = torch.Generator().manual_seed(0)
X = torch.randn(N, L, H * D, generator=G)
LENGTHS = torch.randint(2, L + 1, (N,), generator=G)
MASK = (torch.arange(L) < LENGTHS[:, None]).long()
OWNERS = torch.eye(2, dtype=torch.float64)[torch.randint(0, 2, (N,), generator=G)]


class Ordered(nn.Module):
    """The same layers on rows in one order or another: "first" (examples), "last", or "middle" (of three)."""

    def __init__(self, seed: int, order: str) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.order = order
        self.a, self.norm, self.scale = nn.Linear(D, 8), nn.LayerNorm(8), nn.Parameter(torch.rand(8) + 0.5)
        self.b = nn.Linear(8, D)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        h = x.unflatten(-1, (H, D))
        turn = {"first": (0, 1, 2, 3), "last": (1, 2, 0, 3), "middle": (1, 0, 2, 3)}[self.order]
        back = torch.argsort(torch.tensor(turn)).tolist()
        h = h.permute(*turn)
        shape = h.shape[:3]
        h = F.linear(h.reshape(-1, D), self.a.weight, self.a.bias).unflatten(0, shape)
        h = (self.norm(h.tanh()) * self.scale).tanh()
        h = F.linear(h.reshape(-1, 8), self.b.weight, self.b.bias).unflatten(0, shape)
        said: Tensor = h.permute(*back).reshape(n, length, H * D)
        return said


def forward(net: nn.Module, batch: dict[str, Any]) -> Tensor:
    said: Tensor = net(batch["x"])
    return said


def solved(a: nn.Module, b: nn.Module, shares: Any, batch: dict[str, Any]) -> tuple[nn.Module, list[SolvedLayer]]:
    net = copy.deepcopy(a)
    with torch.no_grad():
        for p, q in zip(net.parameters(), b.parameters(), strict=True):
            p.copy_((p + q) / 2)
    done = solve_network(net, [a, b], shares, lambda m, given: m(given["x"]), [batch])
    return net, done


@pytest.mark.parametrize("order", ["last", "middle"])
def test_the_order_of_rows_makes_no_difference(order: str) -> None:
    """Where every model has its own examples, beside the network whose rows are example by example."""
    results = []
    for kind in ("first", order):
        a, b = Ordered(0, kind).eval(), Ordered(1, kind).eval()
        net, done = solved(a, b, OWNERS, {"x": X})
        assert [layer.weights[0].split(".")[0] for layer in done] == ["a", "norm", "scale", "b"]
        results.append((net.state_dict(), [layer.after for layer in done]))
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-4, abs=1e-6)
    for name, value in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("order", "outer"), [("first", 1), ("last", L * H), ("middle", L)])
@pytest.mark.parametrize("count", [2, 5, L, N])
def test_where_the_examples_lie(order: str, outer: int, count: int) -> None:
    net = Ordered(0, order).eval()
    batch = {"x": X[:count]}
    wanted = record(net, forward, batch).stops
    assert len(wanted) == 4
    assert outers(net, forward, batch, wanted) == {stop.index: outer for stop in wanted}


def test_a_batch_of_one_has_one_order() -> None:
    net = Ordered(0, "last").eval()
    batch = {"x": X[:1]}
    assert outers(net, forward, batch, record(net, forward, batch).stops) == dict.fromkeys(range(4), 1)


class Attending(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.mix, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        padding = None if attention_mask is None else attention_mask == 0
        said: Tensor = self.head(self.mix(x, x, x, key_padding_mask=padding, need_weights=False)[0])
        return said


class Recurrent(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.mix, self.head = nn.Linear(8, 8), nn.GRU(8, 7, batch_first=True), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        said: Tensor = self.head(self.mix(self.first(x))[0])
        return said


def test_padding_does_not_count_in_attention() -> None:
    """Whatever stands there."""
    a, b = Attending(0).eval(), Attending(1).eval()
    wild = torch.where(MASK[..., None] > 0, X, 100 * X)
    nets = []
    for x in (X, wild):
        net = copy.deepcopy(a)
        batch = {"x": x, "attention_mask": MASK}
        done = solve_network(net, [a, b], [0.5, 0.5], lambda m, given: m(**given), [batch])
        nets.append(net.state_dict())
        assert "mix.out_proj.weight" in {name for layer in done for name in layer.weights if layer.after < layer.before}
    for name, value in nets[0].items():
        torch.testing.assert_close(nets[1][name], value)


@pytest.mark.parametrize("kind", [Attending, Recurrent])
def test_every_example_imitates_its_owner(kind: Any) -> None:
    """In one batch as in batches of one, in which no order can be mistaken."""
    a, b = kind(0).eval(), kind(1).eval()
    shift = torch.where(OWNERS[:, :1, None] > 0, 2.0, -2.0).float()
    x = torch.cat([X[..., :1] + shift, X[..., 1:]], -1)
    errors = []
    for size in (N, 1):
        net = copy.deepcopy(a)
        with torch.no_grad():
            for p, q in zip(net.parameters(), b.parameters(), strict=True):
                p.copy_((p + q) / 2)
        solve_network(net, [a, b], OWNERS, forward, [{"x": part} for part in x.split(size)])
        with torch.no_grad():
            wanted = torch.where(OWNERS[:, :1, None] > 0, a(x), b(x))
            errors.append(float((net(x) - wanted).square().mean()))
    assert errors[0] < 1.1 * errors[1]


class Sorted(nn.Module):
    """Rows in an order that depends on what they hold."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        order = rows[:, 0].argsort()
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        said: Tensor = self.b(F.linear(rows[order], self.a.weight, self.a.bias)[back].unflatten(0, x.shape[:2]).tanh())
        return said


@pytest.mark.parametrize(
    ("shares", "more", "expected"),
    [([0.5, 0.5], {}, True), (OWNERS, {}, False), ([0.5, 0.5], {"attention_mask": MASK}, False)],
)
def test_rows_of_nobody_knows_whom(shares: Any, more: dict[str, Tensor], expected: bool) -> None:
    """They are fitted only where it does not matter whose they are."""
    _, done = solved(Sorted(0).eval(), Sorted(1).eval(), shares, {"x": X, **more})
    names = {name for layer in done for name in layer.weights}
    assert "b.weight" in names and ("a.weight" in names) == expected


class Twos(Sorted):
    """Takes batches of two examples."""

    def forward(self, x: Tensor) -> Tensor:
        said: Tensor = self.b(self.a(x.reshape(2, -1, 8)).tanh())
        return said.reshape(2, -1, 3)


def test_a_network_for_batches_of_two() -> None:
    a, b = Twos(0).eval(), Twos(1).eval()
    net = copy.deepcopy(a)
    batches = [{"x": x} for x in torch.randn(40, 2, 5, 8, generator=torch.Generator().manual_seed(0))]
    done = solve_network(net, [a, b], [0.5, 0.5], forward, batches)
    assert {name for layer in done for name in layer.weights} >= {"a.weight", "b.weight"}
