"""Small networks that show what once went wrong in a transformers model."""

from __future__ import annotations

import pytest
import torch
from graph_helpers import only, seeded, sound, traced
from torch import nn
from torch.nn import functional as F

from mergeid.neuron_graph.verify import verify


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


class Fusion(nn.Module):
    """Vectors of an image take the places of placeholders in a text; the mask has one value per token."""

    def __init__(self, expanded: bool) -> None:
        super().__init__()
        self.text, self.image, self.head = nn.Embedding(9, 16), nn.Linear(5, 16), nn.Linear(16, 3)
        self.expanded = expanded

    def forward(self, ids, image):
        x = self.text(ids)
        mask = (ids == 8).unsqueeze(-1)
        if self.expanded:
            mask = mask.expand_as(x)
        return self.head(x.masked_scatter(mask, self.image(image)))


@pytest.mark.parametrize("expanded", [True, False])
def test_image_vectors_and_text_are_one_stream(expanded):
    ids = torch.tensor([[8, 8, 1, 2, 3], [8, 8, 5, 6, 7]])
    graph = sound(lambda: Fusion(expanded), (ids, torch.randn(4, 5)))
    assert only(graph, "text.weight", 1) is only(graph, "image.weight", 0)


class Delta(nn.Module):
    """A linear attention that solves a triangular system over tokens, for every channel of the values."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values, self.out = nn.Linear(6, 12), nn.Linear(6, 20), nn.Linear(20, 4)

    def forward(self, x):
        k, v = self.keys(x), self.values(x)
        system = torch.eye(x.shape[1]) + (k @ k.mT).tril(-1) / 12
        return self.out(torch.linalg.solve_triangular(system.to(x), v, upper=False))


def test_a_triangular_system_over_tokens_leaves_channels_free():
    graph = sound(Delta, (torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0)),))
    assert graph.unknown_ops == {}
    assert only(graph, "keys.weight", 0).size == 12 and only(graph, "values.weight", 0) is only(graph, "out.weight", 1)


class Mixing(nn.Module):
    """Tokens mixed by a Fourier transform, pairs of channels by complex rotations."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 4)
        self.both = both

    def forward(self, x):
        h = self.first(x)
        h = torch.fft.fft(h, dim=1).real
        h = torch.fft.fft(h, dim=-1).real if self.both else h
        pairs = torch.view_as_complex(h.reshape(*h.shape[:-1], 8, 2).contiguous())
        turned = pairs * torch.polar(torch.ones(x.shape[1], 1), torch.arange(x.shape[1]).float()[:, None]).to(pairs)
        return self.second(torch.view_as_real(turned).flatten(2))


@pytest.mark.parametrize(("both", "size"), [(False, 8), (True, 0)])
def test_fourier_transforms_and_complex_pairs(both, size):
    graph = sound(lambda: Mixing(both), (torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0)),))
    assert graph.unknown_ops == {}
    assert [s.size for s in graph.spaces] == ([size] if size else [])


class Identity(nn.Module):
    """A weight's row norms by way of the identity, as DoRA has them; the identity may be rolled (the same neurons under
    shifted numbers) or summed up (order matters)."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 16), nn.Linear(16, 8), nn.Linear(8, 3)
        self.change = change

    def forward(self, x):
        eye = torch.eye(16, dtype=x.dtype)
        eye = eye.roll(1, 0) if self.change == "rolled" else eye.cumsum(0) if self.change == "summed" else eye
        whole = self.second.weight @ eye
        return self.third(F.linear(self.first(x).relu(), whole) / whole.norm(dim=1))


@pytest.mark.parametrize(("change", "sizes"), [("", [8, 16]), ("rolled", [8, 16]), ("summed", [8])])
def test_identity_matrices(change, sizes):
    graph = sound(lambda: Identity(change), (torch.randn(5, 6, generator=torch.Generator().manual_seed(0)),))
    assert sorted(s.size for s in graph.spaces) == sizes


class Languages(nn.Module):
    """An adapter for every language of a batch; one of them has no rows (X-MOD)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.adapters = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x, language):
        h = self.first(x)
        new = torch.zeros_like(h)
        for k, adapter in enumerate(self.adapters):
            new[language == k] = adapter(h[language == k])
        return self.last(h + new)


def test_a_layer_without_rows_tells_what_its_weights_belong_to():
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    graph = sound(Languages, (x, torch.zeros(2, dtype=torch.long)))
    stream = only(graph, "first.weight", 0)
    for k in range(2):
        assert only(graph, f"adapters.{k}.weight", 0) is stream is only(graph, f"adapters.{k}.weight", 1)


class Masked(nn.Module):
    """Adds two masks of the lowest number of its float: finite in float32 only (ProphetNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x):
        low = -2e38 if x.dtype == torch.float32 else torch.finfo(x.dtype).min
        scores = torch.full((2,), low, dtype=x.dtype) * 1.5
        return self.second(self.first(x).relu()) * (scores - scores).exp().sum()


def test_a_model_that_overflows_in_double_is_checked_in_float():
    model = seeded(Masked).float()
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    graph = traced(model, (x,))
    checked = verify(graph, model, (x,), lambda m, i: m(*i), generator=torch.Generator().manual_seed(0))
    assert checked.failed == () and checked.graph.verified is not None
    assert checked.graph.verified["dtype"] == "float32"
