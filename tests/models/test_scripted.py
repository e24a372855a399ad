"""Scripted and traced modules: verbs run them as they are; they take no hooks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mergeid

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
DATA = [(x,) for x in torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*:DeprecationWarning",
    "ignore:.*torch.jit.*:FutureWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",  # copies of scripted modules
)


def plain(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).eval()


class Inside(nn.Module):
    """A scripted trunk under a head that is not."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.trunk = torch.jit.script(plain(seed))
        self.head = nn.Sequential(nn.Linear(3, 12), nn.ReLU(), nn.Linear(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


MADE = {
    "scripted": lambda seed: torch.jit.script(plain(seed)),
    "traced": lambda seed: torch.jit.trace(plain(seed), X),
    "inside": lambda seed: Inside(seed).eval(),
}


@pytest.mark.parametrize("kind", MADE)
def test_scripted(kind: str) -> None:
    make: Callable[[int], nn.Module] = MADE[kind]
    a, b = make(0), make(0)
    graph = mergeid.graph(a, X)
    assert 8 in [s.size for s in graph.spaces] and graph.verified["max_relative_error"] < 1e-9
    state = {k: v.clone() for k, v in a.state_dict().items()}
    b.load_state_dict(graph.apply_state(graph.random_element(torch.Generator().manual_seed(1)), state))
    torch.testing.assert_close(a(X), b(X))
    for data in (None, DATA):
        merged = mergeid.merge(a, b, example_inputs=X, data=data).state
        assert all(torch.equal(merged[k], v) for k, v in state.items())
    assert mergeid.predict(a, make(1), example_inputs=X, data=DATA).outlooks
    assert (
        mergeid.merge(a, make(1), example_inputs=X, data=DATA, match="always", force=True).state.keys() == state.keys()
    )
    assert all(torch.equal(v, state[k]) for k, v in a.state_dict().items())
