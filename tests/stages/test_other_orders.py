"""Neurons whose order hangs on whole numbers that differ between two models are not moved."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import mergeid
from mergeid.errors import MergeidWarning


class Shuffled(nn.Module):
    """Mixes its neurons in an order that a buffer holds, and has a layer of other neurons beside it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.out = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.up, self.down = nn.Linear(16, 12), nn.Linear(12, 16)
        self.register_buffer("order", torch.randperm(16))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        h = h + self.b(h[:, self.order]).tanh() + self.down(self.up(h).relu())
        return self.out(h[:, self.order].sin())


@pytest.mark.parametrize("same", [False, True])
def test_a_model_aligned_is_its_own_function(same: bool) -> None:
    a, b = Shuffled(0).eval(), Shuffled(1).eval()
    if same:
        b.order.copy_(a.order)
    x, aligned = torch.randn(64, 6), copy.deepcopy(b)
    with pytest.warns(MergeidWarning, match="whole numbers in 'order'") if not same else nullcontext():
        found = mergeid.align(b, a, example_inputs=x[:4])
    assert found.state is not None
    aligned.load_state_dict(found.state)
    torch.testing.assert_close(aligned(x), b(x), rtol=1e-5, atol=1e-5)


def test_other_neurons_are_matched_still() -> None:
    a = Shuffled(0).eval()
    b = copy.deepcopy(a)
    p = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        b.up.weight.copy_(a.up.weight[p])
        b.up.bias.copy_(a.up.bias[p])
        b.down.weight.copy_(a.down.weight[:, p])
        b.order.copy_(b.order.flip(0))
    with pytest.warns(MergeidWarning, match="whole numbers in 'order'"):
        found = mergeid.align(b, a, example_inputs=torch.randn(4, 6))
    assert found.state is not None
    torch.testing.assert_close(found.state["up.weight"], a.up.weight)
