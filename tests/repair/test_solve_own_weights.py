"""What a layer may be given: parameters that nothing else uses, and only those."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import mergeid
from mergeid.repair.made import Place
from mergeid.repair.solve import SolvedLayer, solve_network
from mergeid.repair.uses import overlap


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def solved(a: nn.Module, b: nn.Module, x: Tensor) -> tuple[nn.Module, nn.Module, list[SolvedLayer]]:
    """The average of two networks, the same solved, and what was done."""
    with torch.no_grad():
        a.eval()(x)  # what it computed from its weights with gradients cannot be copied
        average = copy.deepcopy(a)
        for p, q in zip(average.parameters(), b.parameters(), strict=True):
            p.copy_((p + q) / 2)
    net = copy.deepcopy(average)
    done = solve_network(net, [a.eval(), b.eval()], [0.5, 0.5], lambda n, batch: n(batch["x"]), [{"x": x}])
    return average, net, done


def error(net: nn.Module, a: nn.Module, b: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((net(x) - (a(x) + b(x)) / 2).square().mean())


class Gated(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)
        self.register_buffer("gate", (torch.arange(16) % 2).float())

    def forward(self, x: Tensor) -> Tensor:
        said: Tensor = self.b(self.a(x).relu() * self.gate)
        return said


class Normed(nn.Module):
    """Layers that compute their weights from parameters and buffers, and a norm with running statistics."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 12))
        self.old = nn.utils.spectral_norm(nn.Linear(12, 12))
        self.turned, self.norm = nn.utils.parametrizations.orthogonal(nn.Linear(12, 12)), nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        said: Tensor = self.head(self.norm(self.turned(self.old(self.spectral(x).relu()).relu())).relu())
        return said


@pytest.mark.parametrize("kind", [Gated, Normed])
def test_buffers_stay_and_are_not_named(kind: Any) -> None:
    a, b = kind(0), kind(1)
    x = seeded(256, 6)
    average, net, done = solved(a, b, x)
    assert {name for layer in done for name in layer.weights} <= set(dict(net.named_parameters()))
    for name, value in average.named_buffers():
        assert torch.equal(value, dict(net.named_buffers())[name]), name
    assert error(net, a, b, x) < 0.5 * error(average, a, b, x)


class Pruned(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a: nn.Module = nn.Linear(6, 16)
        self.h, self.b = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        said: Tensor = self.b(self.h(self.a(x).relu()).relu())
        return said


@pytest.mark.parametrize("once", [True, False])
def test_what_is_pruned_stays_pruned(once: bool) -> None:
    """With a mask of one layer, and with one mask that two layers share."""
    a, b = Pruned(0), Pruned(1)
    mask = (torch.rand(16, 16, generator=torch.Generator().manual_seed(2)) < 0.5).float()
    x = seeded(256, 6)
    for net in (a, b):
        prune.custom_from_mask(net.h, "weight", mask.clone())
        if not once:
            more = prune.custom_from_mask(nn.Linear(16, 16), "weight", mask)
            more.register_buffer("weight_mask", net.h.weight_mask)
            net.a = nn.Sequential(net.a, nn.ReLU(), more)
    average, merged, done = solved(a, b, x)
    state = merged.state_dict()
    assert torch.equal(state["h.weight_mask"], mask)
    assert torch.equal(state["h.weight_orig"][mask == 0], average.state_dict()["h.weight_orig"][mask == 0])
    fitted = {name for layer in done if layer.after < layer.before for name in layer.weights}
    assert fitted >= {"h.weight_orig"} | (set() if once else {"a.2.weight_orig"})
    assert error(merged, a, b, x) < 0.5 * error(average, a, b, x)


def test_a_merge_of_pruned_models_is_as_sparse_as_they_are() -> None:
    a, b = Pruned(0).eval(), Pruned(1).eval()
    mask = (torch.rand(16, 16, generator=torch.Generator().manual_seed(2)) < 0.5).float()
    for net in (a, b):
        prune.custom_from_mask(net.h, "weight", mask.clone())
    rows = [{"x": x} for x in seeded(96, 6)]
    inputs = {"x": seeded(2, 6)}
    made = mergeid.merge(a, b, data=rows, example_inputs=inputs, force=True, match="never", repair="solve")
    assert made.state is not None and torch.equal(made.state["h.weight_mask"], mask)


class Tied(nn.Module):
    """The head is a part of the embedding."""

    def __init__(self, seed: int, part: slice) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table, self.a, self.b, self.part = nn.Embedding(12, 8), nn.Linear(8, 16), nn.Linear(16, 8), part

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.b(self.a(self.table(x).mean(1)).relu()), self.table.weight[self.part])


@pytest.mark.parametrize("part", [slice(0, 10), slice(2, 12), slice(0, 12, 2)])
def test_a_head_that_is_a_part_of_the_embedding_stays_averaged(part: slice) -> None:
    a, b = Tied(0, part), Tied(1, part)
    ids = torch.randint(0, 12, (256, 5), generator=torch.Generator().manual_seed(3))
    average, net, done = solved(a, b, ids)
    assert torch.equal(net.get_parameter("table.weight"), average.get_parameter("table.weight"))
    assert {name for layer in done for name in layer.weights} == {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert error(net, a, b, ids) <= error(average, a, b, ids)


def test_parts_overlap_where_they_have_an_entry_in_common() -> None:
    memory = torch.arange(60).reshape(6, 10)
    parts = [
        memory, memory.t(), memory[:3], memory[3:], memory[2:4], memory[:, :5], memory[:, 5:], memory[:, 4:6],
        memory[::2], memory[1::2], memory[0, :1].expand(3, 4), memory.reshape(3, 20)[:, 10:], memory[1:5, 2:4].t(),
    ]  # fmt: skip
    places = [Place("w", tuple(p.shape), p.stride(), int(p.storage_offset())) for p in parts]
    for (p, one), (q, other) in itertools.product(zip(parts, places, strict=True), repeat=2):
        common = set(p.flatten().tolist()) & set(q.flatten().tolist())
        assert overlap(one, other) == bool(common), (one, other)
