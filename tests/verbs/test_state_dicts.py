"""Merges of live modules in memory: state dicts that `load_state_dict` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergeid
from mergeid.errors import MergeidError

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Counting(nn.Module):
    """Keeps more than tensors."""

    def __init__(self, count: int = 0) -> None:
        super().__init__()
        self.a, self.b, self.count = nn.Linear(4, 5), nn.Linear(5, 3), count

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())

    def get_extra_state(self) -> dict[str, int]:
        return {"count": self.count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.count = state["count"]


@pytest.mark.parametrize(
    ("verb", "count"),
    [
        (lambda a, b: mergeid.merge(a, b, example_inputs=X, match="never"), 1),
        (lambda a, b: mergeid.merge(a, b, example_inputs=X, match="always"), 1),
        (lambda a, b: mergeid.align(b, to=a, example_inputs=X), 2),  # which is B
    ],
    ids=["plain", "matched", "aligned"],
)
def test_extra_state_is_there(verb: Callable[[Any, Any], Any], count: int) -> None:
    state = verb(Counting(1).eval(), Counting(2).eval()).state
    net = Counting()
    net.load_state_dict(state)
    assert net.count == count
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items() if name != "_extra_state")


def test_one_model_alone_is_no_merge() -> None:
    with pytest.raises(MergeidError, match="there is only one model; name two or more"):
        mergeid.merge(Counting(1).eval())
