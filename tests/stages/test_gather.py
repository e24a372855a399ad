"""Passes over the calibration examples: no longer than they are of use, and no more rows than are needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mergeid
from mergeid.neuron_graph.neuron_graph import TapMap
from mergeid.stages.gather import LEAST_POSITIONS, POSITIONS, ROWS, WIDE, rows_of_each

EXAMPLES = 24


def tap(width: int) -> TapMap:
    return TapMap("layer", "in", 0, 2, (1,), np.arange(width))


@given(st.integers(1, 4 * WIDE), st.integers(1, 100_000))
def test_rows_of_an_example(width: int, examples: int) -> None:
    found = rows_of_each({"s": [tap(3), tap(width)]}, examples)
    assert LEAST_POSITIONS <= found <= POSITIONS
    if width <= WIDE or examples * POSITIONS <= ROWS:
        assert found == POSITIONS
    else:
        assert examples * found <= max(ROWS, LEAST_POSITIONS * examples)


REACHED: list[float] = []
"""Of networks whose head's input was reached with all examples, a weight. (Attributes are put back.)"""


class Words(nn.Module):
    """A small network with a head that nobody should run on calibration examples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 10)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.second(torch.relu(self.first(x))))
        if len(x) == EXAMPLES:
            REACHED.append(self.first.weight[0, 0].item())
        return self.head(hidden)


def test_a_pass_ends_at_the_last_tap(monkeypatch: Any) -> None:
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(Words())
    ran: list[int] = []
    forward = nn.Linear.forward

    def counted(self: nn.Linear, x: Tensor) -> Tensor:
        if self.out_features == 5:
            ran.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    data = list(torch.randn(EXAMPLES, 6, generator=torch.Generator().manual_seed(0)))
    plan = mergeid.plan(*models, data=data, example_inputs=torch.zeros(2, 6), batch_size=EXAMPLES)
    assert len(plan.spaces) == 2 and plan.examples == EXAMPLES
    assert ran and EXAMPLES not in ran and EXAMPLES // 2 not in ran
    assert all(m.first.weight[0, 0].item() in REACHED for m in models)
