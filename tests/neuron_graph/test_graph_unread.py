"""Rows of a position table that the traced input never reaches must not move: a longer input reads them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import mergeid


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(20, 12))
        self.inner = nn.Linear(12, 16)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.inner(x + self.table[: x.shape[1]]))).sum(1)


def test_unread_positions_are_frozen() -> None:
    torch.manual_seed(0)
    model = Positions().eval()
    graph = mergeid.graph(model, torch.randn(2, 7, 12))
    assert all((a.tensor, a.axis) != ("table", 0) for s in graph.spaces for a in s.axes)
    assert {s.size for s in graph.spaces} == {16}
    long = torch.randn(2, 20, 12)
    before = model(long)
    element = graph.random_element(torch.Generator().manual_seed(3))
    model.load_state_dict(graph.apply_state(element, model.state_dict()))
    torch.testing.assert_close(model(long), before)
