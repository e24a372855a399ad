"""Which model a merge leans to."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from evaluate_helpers import runs
from torch import Tensor, nn

import mergeid
from mergeid.evaluate.trusted import DOUBTED, most_trusted


def said(models: list[nn.Module], data: Tensor, shares: list[float], classes: bool = True) -> int:
    first: Any = runs(models[0], data, classes, lambda model, batch: {"out": model(batch["x"])})
    return most_trusted(first, models, shares, [{"x": part} for part in data.split(7)])


def oracle(models: list[nn.Module], data: Tensor, shares: list[float]) -> int:
    """Example by example: how unsure a model is, and what the mixture gives to the class that it would name."""
    worth, entropy = [0.0] * len(models), [0.0] * len(models)
    for x in data:
        each = [torch.softmax(m(x[None])[0].double(), 0).tolist() for m in models]
        mixed = [sum(s * p[c] for s, p in zip(shares, each, strict=True)) for c in range(len(each[0]))]
        for k, p in enumerate(each):
            worth[k] += mixed[max(range(len(p)), key=p.__getitem__)] / len(data)
            entropy[k] -= sum(v * math.log(v) for v in p) / len(data)
    return min((k for k in range(len(models)) if worth[k] >= max(worth) - DOUBTED), key=entropy.__getitem__)


@pytest.mark.parametrize("seed", range(5))
def test_as_a_plain_loop_says(seed: int) -> None:
    torch.manual_seed(seed)
    models: list[nn.Module] = [nn.Linear(4, 5) for _ in range(3)]
    data, shares = torch.randn(20, 4), [0.5, 0.2, 0.3]
    with torch.no_grad():
        assert said(models, data, shares) == oracle(models, data, shares)


def test_equals_and_values_stay_with_the_first() -> None:
    one, data = nn.Linear(4, 5), torch.randn(20, 4)
    assert said([one, copy.deepcopy(one)], data, [0.5, 0.5]) == 0
    assert said([one, nn.Linear(4, 5)], data, [0.5, 0.5], classes=False) == 0


class Always(nn.Module):
    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits + 0 * x[:, :1]


def test_a_model_that_is_sure_of_nonsense_is_not_trusted() -> None:
    data = torch.randn(20, 4)
    sane, surer, nonsense = Always([2.0, 0.0, 0.0]), Always([3.0, 0.0, 0.0]), Always([0.0, 0.0, 50.0])
    assert said([sane, surer], data, [0.5, 0.5]) == 1
    assert said([nonsense, sane, surer], data, [1 / 3] * 3) == 2


def blobs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (count,), generator=generator)
    angle = y * math.pi / 2
    x = torch.stack([angle.cos(), angle.sin()], 1) + 0.35 * torch.randn(count, 2, generator=generator)
    return torch.cat([x, x.square(), torch.randn(count, 4, generator=generator)], 1), y


def test_what_leans_is_better_than_the_mean_of_two_unlike_networks() -> None:
    """One has learned, the other hardly, whichever comes first."""
    (x, y), (u, v), (known, _) = blobs(600, 0), blobs(600, 1), blobs(300, 2)
    nets = []
    for k, steps in enumerate((300, 25)):
        torch.manual_seed(k)
        net = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))
        optimiser = torch.optim.Adam(net.parameters(), 1e-2 if not k else 2e-3)
        for _ in range(steps):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimiser.step()
        nets.append(net.eval())

    @torch.no_grad()
    def loss(net: nn.Module) -> float:
        return float(nn.functional.cross_entropy(net(u), v))

    good, poor = map(loss, nets)
    assert good < poor - 0.1
    for a, b in (nets, nets[::-1]):
        merged = copy.deepcopy(a)
        made = mergeid.merge(
            a, b, data=[{"input": row} for row in known], example_inputs={"input": known[:2]}, match="always",
            repair="solve+lean", force=True,
        )  # fmt: skip
        merged.load_state_dict(made.state)
        assert made.repair is not None and made.repair["kind"] == "solve+lean"
        assert loss(merged) < (good + poor) / 2
