"""Finite masks among the outputs (logits of −1e9) hide no error, and freeze nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from graph_helpers import call, only, seeded, traced
from torch import Generator, Tensor, nn

from mergeid.neuron_graph.powers import find_powers
from mergeid.neuron_graph.turns import find_turns
from mergeid.neuron_graph.verify import verify

X = (torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0)).double(),)
MASKS = [0.0, -1e4, -1e9, -1e20]


class Masked(nn.Module):
    """Attention whose logits of one class are far below the others, and another one beside it."""

    def __init__(self, mask: float, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.ones, self.others = (nn.ModuleDict({k: nn.Linear(6, 8) for k in "qkv"}) for _ in range(2))
        self.head, self.other, self.mask, self.between = nn.Linear(8, 3), nn.Linear(8, 2), mask, between

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        def heads(layers: nn.ModuleDict, f: Callable[[Tensor], Tensor]) -> Tensor:
            q, k, v = (layers[n](x).unflatten(-1, (2, 4)).transpose(1, 2) for n in "qkv")
            return F.scaled_dot_product_attention(f(q), f(k), f(v)).transpose(1, 2).flatten(2)

        masked = self.head(heads(self.ones, self.between)) + torch.tensor([0, self.mask, 0]).to(x)
        return masked, self.other(heads(self.others, lambda y: y))


def made(mask: float, between: Callable[[Tensor], Tensor]) -> nn.Module:
    return seeded(lambda: Masked(mask, between))


@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_freezes_nothing_and_hides_nothing(mask: float) -> None:
    model = made(mask, torch.tanh)
    graph = traced(model, X)
    found = verify(graph, model, X, call, generator=Generator().manual_seed(0))
    assert found.failed == () and len(found.graph.spaces) == len(graph.spaces) == 6
    values = only(graph, "ones.v.weight", 0)
    axes = tuple(a for a in values.axes if a.tensor != "ones.v.weight")
    wrong = replace(graph, spaces=[replace(s, axes=axes) if s is values else s for s in graph.spaces])
    assert values.id in verify(wrong, model, X, call, generator=Generator().manual_seed(0)).failed


@pytest.mark.parametrize("mask", MASKS)
def test_a_masked_output_by_itself(mask: float) -> None:
    model = made(mask, torch.tanh)
    graph = traced(model, X)
    found = verify(graph, model, X, lambda m, x: m(*x)[0], generator=Generator().manual_seed(0)).graph
    wanted = {only(graph, f"ones.{k}.weight", 0).id for k in "qv"}
    assert {s.id for s in found.spaces} >= wanted


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("between", "turns"), [(torch.tanh, 2), (lambda y: y, 4)])
def test_maps_of_heads(mask: float, between: Callable[[Tensor], Tensor], turns: int) -> None:
    model = made(mask, between)
    graph = traced(model, X)
    found = find_turns(graph, model, X, call, generator=Generator().manual_seed(0))
    assert len(found) == turns
    before = model(*X)
    drawn = [t.random(Generator().manual_seed(1)) for t in found]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for turn in drawn:
        state = {k: turn.apply(k, v) for k, v in state.items()}
    model.load_state_dict(state)
    for one, other in zip(before, model(*X), strict=True):
        kept = [0, 2] if one.shape[-1] == 3 else [0, 1]  # what is added to −1e20 is lost
        torch.testing.assert_close(other[..., kept], one[..., kept])


class Gated(nn.Module):
    def __init__(self, mask: float) -> None:
        super().__init__()
        self.a, self.b, self.mask = nn.Linear(6, 8), nn.Linear(8, 3), mask

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()) + torch.tensor([0, self.mask, 0]).to(x)


@pytest.mark.parametrize("mask", MASKS)
def test_scales(mask: float) -> None:
    model = seeded(lambda: Gated(mask))
    graph = traced(model, X)
    found = find_powers(graph, model, X, call, generator=Generator().manual_seed(0), only=[s.id for s in graph.spaces])
    assert len(found.scaled) == 1
