"""Small networks that show what once went wrong in a transformers model."""

from __future__ import annotations

import torch
from graph_helpers import only, seeded, sound, traced
from torch import nn
from torch.nn import functional as F

from mergeid.graph.verify import verify


class Deformable(nn.Module):
    """Attention that samples a map at places of its own, heads folded into the batch (Deformable DETR)."""

    def __init__(self, width: int = 8, heads: int = 4, points: int = 3) -> None:
        super().__init__()
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, 5)
        self.offsets, self.weights = nn.Linear(width, heads * points * 2), nn.Linear(width, heads * points)
        self.heads, self.points = heads, points

    def forward(self, x):
        b, n, c = x.shape
        h, p = self.heads, self.points
        value = self.value(x).transpose(1, 2).reshape(b * h, c // h, 2, n // 2)
        grid = self.offsets(x).view(b, n, h, p, 2).transpose(1, 2).flatten(0, 1).tanh()
        weights = self.weights(x).view(b, n, h, p).softmax(-1).transpose(1, 2).reshape(b * h, 1, n, p)
        found = F.grid_sample(value, grid, align_corners=False)
        return self.out((found * weights).sum(-1).view(b, c, n).transpose(1, 2))


def test_heads_go_with_the_places_that_they_sample():
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    graph = sound(Deformable, (x,))
    inner = only(graph, "value.weight", 0)
    assert (inner.size, inner.blocks) == (8, 4)


class Casting(nn.Module):
    """A norm that computes in float32, whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x):
        h = self.first(x).to(torch.float32)
        return self.second((h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True))).type_as(x))


def test_a_check_in_double_precision_has_it_throughout():
    model = seeded(Casting)
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    graph = traced(model, (x,))
    checked = verify(graph, model, (x,), lambda m, i: m(*i), generator=torch.Generator().manual_seed(0))
    assert checked.failed == () and checked.error < 1e-13


class Sampling(nn.Module):
    """Tokens are dropped at random, also when it is used (EoMT's masks, VITS' noise)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.second(self.first(x).relu() * (torch.rand(len(x), 1, dtype=x.dtype) > 0.5))


def test_random_draws_are_the_same_in_every_run_of_a_check():
    model = seeded(Sampling)
    x = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    graph = traced(model, (x,))
    state = torch.get_rng_state()
    checked = verify(graph, model, (x,), lambda m, i: m(*i), generator=torch.Generator().manual_seed(0))
    assert checked.failed == () and len(checked.graph.spaces) == 1
    assert torch.equal(state, torch.get_rng_state()), "the global generator is left as it was"
