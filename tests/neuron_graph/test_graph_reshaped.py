"""Tensors whose shape changes in place (t_, squeeze_, …) while views of them are about."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graph_helpers import sound
from torch import Tensor, nn

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


def transposed(h: Tensor, k: Tensor) -> Tensor:
    part = h[:, :4]
    h.t_()
    return torch.cat([part, h.t()], 1) + k.sum()


def swapped(h: Tensor, k: Tensor) -> Tensor:
    part = h[:, :4]
    h.swapaxes_(0, 1)
    h.mul_(3)
    return h.t()[:, :4] + part


def unsqueezed(h: Tensor, k: Tensor) -> Tensor:
    part = h[:, 2:]
    h.unsqueeze_(0)
    return part + h[0][:, 2:]


def unsqueezed_and_written(h: Tensor, k: Tensor) -> Tensor:
    part = h[:, 2:]
    h.unsqueeze_(0)
    return h.mul_(2).sum() + part


def transposed_and_written(h: Tensor, k: Tensor) -> Tensor:
    part = h[:, :4]
    h.t_()
    h.add_(k.t())
    return torch.cat([part, h.t()], 1)


def view_transposed(h: Tensor, k: Tensor) -> Tensor:
    view = h.view(2, 2, 4)
    view.transpose_(1, 2)
    h.mul_(k)
    return view.flatten(1)


def view_of_a_view(h: Tensor, k: Tensor) -> Tensor:
    view = h.view(2, 8)
    part = view[:, :4]
    view.unsqueeze_(1)
    return part * view[:, 0, :4]


def view_of_a_view_written(h: Tensor, k: Tensor) -> Tensor:
    view = h.view(2, 8)
    part = view[:, :4]
    view.unsqueeze_(1)
    h.add_(k)
    return part * view[:, 0, :4]


def view_squeezed_and_written(h: Tensor, k: Tensor) -> Tensor:
    view = h[:, None, :]
    part = view[..., 1:]
    view.squeeze_(1)
    view.mul_(k)
    return part[:, 0]


def filled(h: Tensor, k: Tensor) -> Tensor:
    made = h.new_zeros(8, 2)
    view = made.t()
    made.transpose_(0, 1)
    made.copy_(h)
    return view + k


def filled_in_part(h: Tensor, k: Tensor) -> Tensor:
    made = h.new_zeros(8, 2)
    part = made[:4]
    made.transpose_(0, 1)
    made.copy_(h)
    return part.t() + k[:, :4]


def filled_through_a_view(h: Tensor, k: Tensor) -> Tensor:
    made = h.new_zeros(2, 8)
    view = made[:, None, :]
    part = view[:, 0]
    view.squeeze_(1)
    view.copy_(h)
    return part + k


CASES: dict[Callable[[Tensor, Tensor], Tensor], list[int]] = {
    transposed: [4, 4, 8],
    swapped: [4, 4, 8],
    unsqueezed: [2, 6, 8],
    unsqueezed_and_written: [2, 6, 8],
    transposed_and_written: [4, 4],
    view_transposed: [8],
    view_of_a_view: [4, 4, 8],
    view_of_a_view_written: [4, 4],
    view_squeezed_and_written: [7],
    filled: [8],
    filled_in_part: [4, 4, 4],
    filled_through_a_view: [8],
}


@pytest.mark.parametrize("run", CASES)
def test_views_taken_before(run: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Their layouts were derived of the new shape: a KeyError, or neurons in the wrong places."""

    class Reshaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)
            with torch.no_grad():
                width = run(torch.zeros(2, 8), torch.zeros(2, 8)).shape[1]
            self.out = nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(run(self.a(x).tanh(), self.b(x).tanh()))

    graph = sound(Reshaped, (X,))
    assert sorted(s.size for s in graph.spaces) == CASES[run]
    assert not graph.unknown_ops
