"""Tensors whose shape changes in place (t_, squeeze_, …), that are read by strides, or are given other memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graph_helpers import seeded, sound, worst_change
from torch import Tensor, nn

from mergeid.basics.untouched import one_pass
from mergeid.neuron_graph.recording import Pass
from mergeid.neuron_graph.trace import trace

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


class Between(nn.Module):
    """Layers of 8 neurons, what is done with their activations [3, 8], and a head."""

    def __init__(self, between: Callable[[Between, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.m, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.between(self, self.a(x).tanh()))


def back_and_forth(net: Between, h: Tensor) -> Tensor:
    h.t_()
    h.transpose_(0, 1)
    h.t_()
    return h.relu_().t_()


def put_in_columns(net: Between, h: Tensor) -> Tensor:
    h.as_strided_((8, 3), (1, 8))
    return h.t_()


def read_beside_a_view(net: Between, h: Tensor) -> Tensor:
    """The other half than the view has."""
    return torch.cat([h.narrow(1, 0, 4).as_strided((3, 4), (8, 1), 4), h[:, :4]], 1)


def resized(net: Between, h: Tensor) -> Tensor:
    return h.resize_(8, 3).mul_(2).resize_as_(torch.empty(3, 8))


def cut_short(net: Between, h: Tensor) -> Tensor:
    return h.resize_(2, 8)


def given_other_numbers(net: Between, h: Tensor) -> Tensor:
    k = net.m(h)
    k.data = net.m(h + 1).tanh()
    return k


def given_another_shape(net: Between, h: Tensor) -> Tensor:
    part = h[:, :4]
    h.data = h.data.t()
    return torch.cat([part, h.t()[:, 4:]], 1)


def given_and_written(net: Between, h: Tensor) -> Tensor:
    k = torch.zeros(3, 8, dtype=h.dtype)
    k.data = h
    k.mul_(2)
    return h


def into_nothing(net: Between, h: Tensor) -> Tensor:
    """A view is what torch makes for the mode to see."""
    return torch.sin(h, out=torch.empty(0, dtype=h.dtype))


def into_a_view_of_nothing(net: Between, h: Tensor) -> Tensor:
    return torch.sin(h, out=torch.zeros(0, dtype=h.dtype)[:])


def into_too_little(net: Between, h: Tensor) -> Tensor:
    made = h.new_zeros(5)
    part = made[:3]
    torch.sin(h, out=made)
    return made + part[:, None]


STRIDED: dict[str, tuple[Callable[[Between, Tensor], Tensor], list[int]]] = {
    "back and forth": (back_and_forth, [8]),
    "the same": (lambda net, h: h.as_strided(h.shape, h.stride()), [8]),
    "columns": (lambda net, h: torch.as_strided(h, (8, 3), (1, 8)).t(), [8]),
    "columns in place": (put_in_columns, [8]),
    "halves": (lambda net, h: torch.cat([h.as_strided((3, 4), (8, 1), k) for k in (4, 0)], 1), [8]),
    "every other": (lambda net, h: torch.cat([h.as_strided((3, 4), (8, 2), k) for k in (0, 1)], 1), [8]),
    "rows apart": (lambda net, h: h.as_strided((3, 2, 4), (8, 4, 1)).flatten(1), [8]),
    "expanded": (lambda net, h: h.as_strided((2, 3, 8), (0, 8, 1)).sum(0), [8]),
    "a row": (lambda net, h: h.as_strided((1, 8), (8, 1), 8), [8]),
    "a copy": (lambda net, h: torch.as_strided_copy(h, (3, 8), (8, 1)), [8]),
    "beside a view": (read_beside_a_view, [8]),
    "one neuron": (lambda net, h: h.as_strided((3, 1), (8, 1), 2) + h, [7]),
    "windows": (lambda net, h: torch.cat([h.as_strided((3, 5, 4), (8, 1, 1))[:, k] for k in (0, 3)], 1), []),
    "a diagonal": (lambda net, h: h * (h.t() @ h).as_strided((8,), (9,)), []),
    "weights in columns": (lambda net, h: h @ net.m.weight.as_strided((8, 8), (1, 8)), [8, 8]),
    "half of the weights": (lambda net, h: (h @ net.m.weight.as_strided((4, 8), (8, 1)).t()).repeat(1, 2), [4, 8, 8]),
    "weights in a row": (
        lambda net, h: h @ torch.cat([net.m.weight.flatten(), net.m.bias]).as_strided((8, 8), (8, 1)).t(),
        [8, 8],
    ),
    "resized": (resized, [8]),
    "cut short": (cut_short, [8]),
    "other numbers": (given_other_numbers, [8, 8]),
    "another shape": (given_another_shape, [8]),
    "given and written": (given_and_written, [8]),
    "into nothing": (into_nothing, [8]),
    "into a view of nothing": (into_a_view_of_nothing, [8]),
    "into too little": (into_too_little, []),
}
"""[3, 8] -> [rows, 8], and the sizes of the spaces that move."""


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("name", STRIDED)
def test_memory_is_followed(name: str) -> None:
    """It was frozen, neurons came apart ("into nothing"), or the trace broke ("another shape")."""
    between, sizes = STRIDED[name]
    graph = sound(lambda: Between(between), (torch.randn(3, 6),))
    assert sorted(s.size for s in graph.spaces) == sizes
    assert not graph.unknown_ops


def turned_in_place(net: Between, h: Tensor) -> Tensor:
    net.m.weight.t_()
    return net.m(h)


def turned_by_numbers(net: Between, h: Tensor) -> Tensor:
    net.m.weight.data = net.m.weight.data.t()
    return net.m(h)


@pytest.mark.parametrize("between", [turned_in_place, turned_by_numbers])
def test_shapes_put_back_are_followed(between: Callable[[Between, Tensor], Tensor]) -> None:
    """A second pass took the weight, which has its own shape again, for a constant: nothing moved."""
    model = seeded(lambda: Between(between))
    inputs = torch.randn(2, 3, 6, dtype=torch.float64)

    def forward(x: Tensor) -> Tensor:
        with one_pass(model):
            found: Tensor = model(x)
        return found

    passes = [Pass(x := each[None], lambda x=x: forward(x[0])) for each in inputs]
    graph = trace(model, passes[0].inputs, passes[0].forward, more=passes[1:], name="turned")
    assert sorted(s.size for s in graph.spaces) == [8, 8]
    assert worst_change(graph, seeded(lambda: Between(between)), (inputs[0],)) < 1e-9
