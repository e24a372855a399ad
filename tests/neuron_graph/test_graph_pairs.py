"""Products of all pairs of channels (bilinear or covariance pooling, Gram matrices) follow them in two roles."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from graph_helpers import only, sound
from torch import Tensor, nn

import mergeid

X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))


class Paired(nn.Module):
    """Channels [B, T, 5], something of all their pairs, a layer that reads it."""

    def __init__(self, pairs: Callable[[Tensor], Tensor], width: int = 25, norm: bool = False) -> None:
        super().__init__()
        self.pairs, self.a = pairs, nn.Linear(6, 5)
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.b, self.out = nn.Linear(width, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(self.norm(self.pairs(self.a(x).relu()).flatten(1))).tanh())


def gram(h: Tensor) -> Tensor:
    return h.mT @ h


def rooted(h: Tensor) -> Tensor:
    g = gram(h)
    return nn.functional.normalize((g.sign() * (g.abs() + 1e-3).sqrt()).flatten(1), dim=1)


def logarithm(h: Tensor) -> Tensor:
    h = h - h.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(gram(h) + 0.1 * torch.eye(5, dtype=h.dtype))
    return vectors @ torch.diag_embed(values.log()) @ vectors.mT


PAIRS: dict[str, tuple[Callable[[Tensor], Tensor], int, int]] = {
    "gram": (gram, 25, 2),
    "rooted": (rooted, 25, 2),
    "logarithm": (logarithm, 25, 2),
    "outer": (lambda h: torch.einsum("bi,bj->bij", h.mean(1), h.mean(1)), 25, 2),
    "not symmetric": (lambda h: torch.einsum("bti,btj->bij", h, h.sigmoid()), 25, 2),
    "broadcast": (lambda h: h.mean(1)[:, :, None] * h.amax(1)[:, None], 25, 2),
    "three": (lambda h: torch.einsum("bi,bj,bk->bijk", *[h.mean(1)] * 3), 125, 3),
    "beside the channels": (lambda h: torch.cat([h.mean(1), gram(h).flatten(1)], 1), 30, 2),
}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_channels_and_their_pairs_are_free(name: str, norm: bool) -> None:
    """The channels stood still, as their pairs were said to have no image."""
    pairs, width, roles = PAIRS[name]
    graph = sound(lambda: Paired(pairs, width, norm), (X,), tolerance=1e-8)
    channels = only(graph, "a.weight", 0)
    assert channels.size == 5
    assert {len(s.parents) for s in graph.spaces if s.id != channels.id and channels.id in s.parents} == {roles}
    element = graph.random_element(torch.Generator().manual_seed(3))
    moved = element[channels.id]
    index = graph.gather_index("b.weight", 1, element)
    want = np.arange(5**roles).reshape([5] * roles)[np.ix_(*[moved] * roles)].reshape(-1)
    assert index is not None
    assert np.array_equal(index[-(5**roles) :] - (width - 5**roles), want)


def test_the_graph_is_read_back(tmp_path: Path) -> None:
    model = Paired(gram).eval()
    graph = mergeid.graph(model, X)
    file = tmp_path / "graph.json"
    file.write_text(json.dumps(graph.to_json()))
    again = mergeid.graph(model, X, graph=file)
    assert [(s.parents, s.block_parents.tolist()) for s in again.spaces] == [
        (s.parents, s.block_parents.tolist()) for s in graph.spaces
    ]


@pytest.mark.parametrize("data", [None, [{"arg0": x} for x in torch.randn(48, 4, 6)]], ids=["weights", "data"])
def test_a_copy_in_another_order_is_brought_back(data: list | None) -> None:
    torch.manual_seed(0)
    a, b = Paired(gram).eval(), Paired(gram).eval()
    graph = mergeid.graph(a, X)
    b.load_state_dict(graph.apply_state(graph.random_element(torch.Generator().manual_seed(1)), a.state_dict()))
    state = mergeid.merge(a, b, example_inputs=X, data=data).state
    assert state is not None
    for name, value in a.state_dict().items():
        assert torch.allclose(state[name], value, atol=1e-6)
