"""A solved head with the classes of two models: each model's rows are fitted to that model's answers alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergeid.repair.solve import solve_network

CLASSES = (2, 3)


def forward(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return net(batch["x"])


def network(seed: int, bias: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, sum(CLASSES), bias=bias)).eval()


def inputs(count: int = 96) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(7))


def narrowed(net: nn.Module, model: int) -> nn.Module:
    """With one model's classes alone."""
    found, rows = copy.deepcopy(net), slice(sum(CLASSES[:model]), sum(CLASSES[: model + 1]))
    head = nn.Linear(16, CLASSES[model], bias=net[2].bias is not None)
    head.weight.data = net[2].weight.data[rows].clone()
    if head.bias is not None:
        head.bias.data = net[2].bias.data[rows].clone()
    found[2] = head
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_each_models_rows_are_solved_as_if_alone(own: bool, bias: bool) -> None:
    """On its own examples where they belong to models, else on all; whatever the other says of these columns."""
    merged, *models = (network(seed, bias) for seed in range(3))
    heads = {"2.weight": CLASSES, **({"2.bias": CLASSES} if bias else {})}
    frozen = [k for k in merged.state_dict() if k.startswith("0.")]
    x = inputs()
    parts = [x[:48], x[48:]]  # so that every fourth of each is every fourth of all
    shares: Any = torch.eye(2).repeat_interleave(48, 0) if own else [0.3, 0.7]
    wanted = []
    for k, model in enumerate(models):
        alone = narrowed(merged, k)
        batches = [{"x": parts[k]}] if own else [{"x": x}]
        done = solve_network(alone, [narrowed(model, k)], [1.0], forward, batches, frozen=frozen)
        assert done[-1].ridge < torch.inf
        wanted.append(alone[2])
    records = solve_network(
        merged, models, shares, forward, [{"x": p} for p in x.split(32)], frozen=frozen, heads=heads
    )
    assert len(records) == 2
    for name, value in merged[2].named_parameters():
        together = torch.cat([dict(w.named_parameters())[name] for w in wanted])
        torch.testing.assert_close(value, together, rtol=1e-4, atol=1e-5)
