"""Outputs in which rounding turns something over are left out by name; they hide no error of the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from graph_helpers import call, traced
from torch import Tensor, nn

from mergeid.neuron_graph.verify import verify
from mergeid.reporting.show_graph import footer


class Balanced(nn.Module):
    """Scores, and which of two equal sums is the larger."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(5, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.first(x))
        one, two = hidden.sum(-1), hidden.unsqueeze(1).mean((1, 2)) * hidden.shape[-1]
        return {"scores": self.head(hidden), "side": torch.sign(one - two), "sum": one}


def made(seed: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    return Balanced().eval(), torch.randn(40, 5)


@pytest.mark.parametrize("seed", range(3))
def test_noise_is_left_out_by_name(seed):
    model, x = made(seed)
    found = verify(traced(model, (x,)), model, (x,), call, generator=torch.Generator().manual_seed(seed))
    assert found.failed == () and found.graph.spaces and found.error < 1e-12
    assert found.graph.verified["noise"] == ["side"]
    assert any(line.endswith("as much: 'side'.") for line in footer(found.graph, collapsed=True))


@pytest.mark.parametrize("seed", range(3))
def test_it_hides_no_wrong_space(seed):
    model, x = made(seed)
    graph = traced(model, (x,))
    (space,) = graph.spaces
    wrong = replace(graph, spaces=[replace(space, axes=tuple(a for a in space.axes if a.tensor != "first.bias"))])
    found = verify(wrong, model, (x,), call, generator=torch.Generator().manual_seed(seed))
    assert found.failed == (space.id,) and not found.graph.spaces


def test_an_output_that_a_permutation_changes_is_no_noise():
    """Nothing but noise is left out: the first neuron's value changes when neurons move, and not by rounding."""
    model, x = made(0)
    graph = traced(model, (x,))

    def more(net: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {**net(*inputs), "first": torch.relu(net.first(*inputs))[:, 0]}

    found = verify(graph, model, (x,), more, generator=torch.Generator().manual_seed(0))
    assert found.failed and not found.graph.spaces
