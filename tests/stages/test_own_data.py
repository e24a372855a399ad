"""Models of different tasks, each with examples of its own."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import mergeid
from mergeid.errors import MergeidError
from mergeid.repair.solve import solve_network
from mergeid.request.request import OwnData

HALVES = ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])


def digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(found.data / 16, dtype=torch.float32)[order], torch.tensor(found.target)[order]


@cache
def pair() -> tuple[nn.Module, nn.Module]:
    """Trained apart, each on half of the classes."""
    x, y = digits()
    nets = []
    for seed, classes in enumerate(HALVES):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
        mine = torch.isin(y[:900], torch.tensor(classes))
        optimiser = torch.optim.Adam(net.parameters(), 0.01)
        for _ in range(60):
            optimiser.zero_grad()
            F.cross_entropy(net(x[:900][mine]), y[:900][mine]).backward()
            optimiser.step()
        nets.append(net.eval())
    return nets[0], nets[1]


def own(count: int = 200) -> dict[str, list[dict[str, Tensor]]]:
    x, y = digits()
    parts = {name: torch.isin(y[900:1350], torch.tensor(c)) for name, c in zip("ab", HALVES, strict=True)}
    return {name: [{"input": row} for row in x[900:1350][mine][:count]] for name, mine in parts.items()}


def accuracy(state: dict[str, Tensor]) -> float:
    """Among all ten classes."""
    net = copy.deepcopy(pair()[0])
    net.load_state_dict(state)
    x, y = digits()
    with torch.no_grad():
        return float((net(x[1350:]).argmax(1) == y[1350:]).float().mean())


def merged(**how: Any) -> mergeid.MergeResult:
    a, b = pair()
    example = {"input": digits()[0][:4]}
    return mergeid.merge(a, b, example_inputs=example, data=own(), force=True, **how)


def test_towards_its_own_model_on_every_example() -> None:
    """Each network alone knows half of the classes."""
    alone = max(accuracy(net.state_dict()) for net in pair())
    assert alone < 0.52
    found = {
        "plain": merged(match="never", repair="none"),
        "mean": merged(repair="solve", target="mean"),
        "own": merged(repair="solve"),
        "auto": merged(),
    }
    right = {name: accuracy(result.state) for name, result in found.items()}
    assert right["own"] > right["mean"] > right["plain"]
    assert right["own"] > 0.8
    assert right["auto"] > right["mean"]


def test_a_row_of_shares_for_every_example() -> None:
    """The same row for all is the same as one for all; a model whose share is 0 everywhere says nothing."""
    a, b = pair()
    batches = [{"input": x} for x in digits()[0][:120].split(40)]

    def forward(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return net(batch["input"])

    def solved(models: list[nn.Module], shares: Any) -> dict[str, Tensor]:
        net = copy.deepcopy(a)
        solve_network(net, models, shares, forward, batches)
        return net.state_dict()

    once, rows = solved([a, b], [0.3, 0.7]), solved([a, b], torch.tensor([[0.3, 0.7]]).expand(120, 2))
    alone, only = solved([b], [1.0]), solved([a, b], torch.tensor([[0.0, 1.0]]).expand(120, 2))
    for key in once:
        torch.testing.assert_close(rows[key], once[key], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(only[key], alone[key], rtol=1e-4, atol=1e-5)


def test_what_own_data_is() -> None:
    assert OwnData.of("a=x.npz,b=y=z,1.npz") == OwnData(("x.npz", "y=z,1.npz"))
    assert OwnData.of({"b": 2, "a": 1}) == OwnData((1, 2))
    assert OwnData.of("folder") == "folder"
    for columns in ({"train": 1}, {"x": 1, "y": 2}, {"x": 1}):  # of a table
        assert OwnData.of(columns) == columns
    with pytest.raises(MergeidError, match="gives data for b twice"):
        OwnData.of("a=1.npz,b=2.npz,b=3.npz")
    for wrong in ("a=x", {"a": 1, "c": 2}):
        with pytest.raises(MergeidError, match="two or more models"):
            OwnData.of(wrong)


def test_what_does_not_go_together_is_said() -> None:
    a, b = pair()
    example = {"input": digits()[0][:4]}
    three = {**own(20), "c": own(20)["a"]}
    for how, message in (
        ({"data": three}, "names 3 models"),
        ({"data": own(20)["a"], "target": "own"}, "--target own needs"),
        ({"data": own(20), "target": "both"}, "not one of own, mean"),
        ({"data": own(20), "repair": "solve+polish"}, "--target mean"),
    ):
        with pytest.raises(MergeidError, match=message):
            mergeid.merge(a, b, example_inputs=example, **how)
