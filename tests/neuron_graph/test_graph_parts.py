"""Parts of tensors: what is written over them, what is put beside them, and parts that lend nothing but their shape."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graph_helpers import TwoLayers, on, only, sound
from torch import Tensor, nn


class Replaced(nn.Module):
    def __init__(self, run: Callable[[Tensor, Tensor], Tensor], width: int = 4) -> None:
        super().__init__()
        self.run, self.a, self.b, self.out = run, nn.Linear(6, 8), nn.Linear(6, width), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.run(self.a(x), self.b(x)).tanh())


X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("run", "own", "source"),
    [
        (lambda h, k: torch.slice_scatter(h, k, 1, 2, 6), [4, 4], [4]),
        (lambda h, k: torch.slice_scatter(h, k, -1, 1, 8, 2), [4, 4], [4]),
        (lambda h, k: torch.slice_scatter(h.new_zeros(2, 8), k, 1, 4), [8], [4]),
        (lambda h, k: torch.select_scatter(h, k.sum(1), 1, 2), [7], [4]),
    ],
    ids=["run", "every second", "zeros", "one"],
)
def test_neurons_written_over_others(run: Callable, own: list[int], source: list[int]) -> None:
    """The operation had no rule, and all of them stood still."""
    graph = sound(lambda: Replaced(run), (X,))
    assert [s.size for s in on(graph, "a.weight", 0)] == own
    assert [s.size for s in on(graph, "b.weight", 0)] == source
    assert not graph.unknown_ops


@pytest.mark.parametrize(
    "run",
    [
        lambda h, k: torch.slice_scatter(h, k[:, :2], 1, 1, 3),
        lambda h, k: torch.slice_scatter(h, k[:, :2], 1, 0, 3, 2),
        lambda h, k: torch.select_scatter(h, k[:, 0], 1, -1),
    ],
)
def test_tokens_written_over_others(run: Callable) -> None:
    graph = sound(lambda: Replaced(run, 8), (torch.randn(2, 5, 6),))
    assert only(graph, "a.weight", 0) == only(graph, "b.weight", 0) == only(graph, "out.weight", 1)


@pytest.mark.parametrize(
    "run",
    [
        lambda h: torch.cat([h, torch.full_like(h[:, :1], 0.5)], 1),
        lambda h: torch.cat([torch.ones_like(h[:, 0]).unsqueeze(1), h], 1),
        lambda h: torch.cat([h, h.unbind(1)[2].new_zeros(len(h), 1)], 1),
        lambda h: torch.cat([h, torch.zeros_like(h.split(1, 1)[3].T.T)], 1),
        lambda h: torch.cat([h, torch.zeros_like(h.narrow(1, 2, 3).select(1, 0)[:, None])], 1),
    ],
    ids=["slice", "select", "unbind", "split", "narrow"],
)
def test_neurons_of_which_only_the_shape_is_used_are_free(run: Callable[[Tensor], Tensor]) -> None:
    """The neuron that was picked stood still."""

    class Timed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(9, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(run(self.a(x).tanh()))

    assert only(sound(Timed, (X,)), "a.weight", 0).size == 8


def test_a_view_that_is_read_later_is_read_as_it_is_then() -> None:
    """Its layout is derived when somebody asks, after the write."""

    class Late(TwoLayers):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros(len(x), 8, dtype=x.dtype)
            part = h[:, 2:5]
            h.copy_(self.a(x).tanh())
            return self.b(h) + part.sum(1, keepdim=True)

    graph = sound(lambda: Late(6, 8), (X,))
    assert sorted(s.size for s in on(graph, "a.weight", 0)) == [3, 5]


class Recurrent(nn.Module):
    """Starts from a state that it has learned."""

    def __init__(self, start: Callable[[nn.Parameter, int], Tensor], first: bool) -> None:
        super().__init__()
        self.start, self.first = start, first
        self.h, self.step, self.out = nn.Parameter(torch.randn(1, 8)), nn.Linear(11, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.start(self.h, len(x))
        for now in x.unbind(1):
            h = self.step(torch.cat([h, now] if self.first else [now, h], -1)).tanh()
        return self.out(h)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "start",
    [
        lambda h, n: h.expand(n, -1),
        lambda h, n: h.repeat(n, 1),
        lambda h, n: h.tanh().repeat_interleave(n, 0),
        lambda h, n: torch.stack([h[0]] * n),
    ],
    ids=["expand", "repeat", "interleave", "stack"],
)
def test_a_learned_state_beside_the_inputs(start: Callable, first: bool) -> None:
    """It was taken for tokens, and the whole state stood still."""
    x = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(0))
    graph = sound(lambda: Recurrent(start, first), (x,))
    state = only(graph, "out.weight", 1)
    assert state.size == 8
    assert [s.id for s in on(graph, "h", 1)] == [s.id for s in on(graph, "step.weight", 1)] == [state.id]


def test_learned_tokens_beside_those_of_the_input_stay_in_place() -> None:
    class Prompted(TwoLayers):
        def __init__(self) -> None:
            super().__init__(6, 8)
            self.prompts = nn.Parameter(torch.randn(1, 3, 8))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.cat([self.prompts.expand(len(x), -1, -1), self.a(x)], 1)
            return self.b(((h @ h.mT).softmax(-1) @ h).tanh())

    graph = sound(Prompted, (torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)),))
    assert only(graph, "a.weight", 0) == only(graph, "prompts", 2)
    assert not on(graph, "prompts", 1)
