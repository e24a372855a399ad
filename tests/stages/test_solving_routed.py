"""Networks that route their inputs: what cannot be solved is merged unsolved, unless solving was asked for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergeid
import mergeid.repair.solve as solve
from mergeid.errors import MergeidError


class Routed(nn.Module):
    """Of eight experts, each example's own one; those that nobody reaches do not run."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.route = nn.Linear(6, 16), nn.Linear(6, 8)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 16)) for _ in range(8))
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, chosen = self.inside(x).relu(), self.route(x).argmax(-1)
        y = torch.zeros_like(h)
        for k, expert in enumerate(self.experts):
            mine = chosen == k
            if mine.any():
                y[mine] = expert(h[mine])
        return self.out(h + y)


def permuted() -> tuple[nn.Module, nn.Module, Tensor]:
    """A network, itself with its neurons and experts in another order, and inputs that reach all experts."""
    torch.manual_seed(0)
    a, x = Routed().eval(), torch.randn(512, 6)
    graph, b = mergeid.graph(a, x), Routed().eval()
    b.load_state_dict(graph.apply_state(graph.random_element(torch.Generator().manual_seed(1)), a.state_dict()))
    return a, b, x


def sine(seed: int) -> nn.Module:
    """A small network that has learned a sine of its first input."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 2))
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(400):
        x = torch.randn(64, 3)
        optimiser.zero_grad()
        (net(x) - torch.stack([(3 * x[:, 0]).sin(), x[:, 1] * x[:, 2]], 1)).square().mean().backward()
        optimiser.step()
    return net.eval()


@pytest.mark.filterwarnings("ignore:the example inputs of Routed never reach")
def test_a_merge_that_cannot_be_solved_is_written_unsolved() -> None:
    """The example reaches two experts only, so that the others are averaged in another order."""
    a, b, x = permuted()
    how: dict[str, Any] = {"data": [{"arg0": row} for row in x], "example_inputs": x[:2], "force": True}
    found = mergeid.merge(a, b, **how)
    assert found.state is not None and not (found.repair or {"kind": ""})["kind"].startswith("solve")
    with pytest.raises(MergeidError, match="do not execute the same operations"):
        mergeid.merge(a, b, **how, repair="solve")


def test_what_is_solved_with_half_of_the_inputs_but_not_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, x = sine(0), sine(1), torch.randn(200, 3)
    how: dict[str, Any] = {"data": [{"arg0": row} for row in x], "example_inputs": x[:2], "force": True}
    assert (mergeid.merge(a, b, **how).repair or {"kind": ""})["kind"].startswith("solve")
    plain = mergeid.merge(a, b, **how, repair="none")
    real = solve.solve_network

    def refuses(merged: nn.Module, models: Any, shares: Any, forward: Any, batches: Any, **more: Any) -> Any:
        if sum(len(batch["arg0"]) for batch in batches) == len(x):
            raise MergeidError("not with all")
        return real(merged, models, shares, forward, batches, **more)

    monkeypatch.setattr(solve, "solve_network", refuses)
    found = mergeid.merge(a, b, **how)
    assert found.repair is None and any("it is written unsolved" in note for note in found.notes)
    assert plain.state is not None and found.state is not None
    if found.verdict == plain.verdict:
        assert all(torch.equal(found.state[k], v) for k, v in plain.state.items())
    with pytest.raises(MergeidError, match="not with all"):
        mergeid.merge(copy.deepcopy(a), b, **how, repair="solve")
