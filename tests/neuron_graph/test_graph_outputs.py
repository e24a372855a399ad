"""Whole numbers and flags that a live module returns are outputs like any other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graph_helpers import disturbed, on, only
from torch import Tensor, nn

import mergeid

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))


class Answering(nn.Module):
    """A hidden layer, and an answer read off the second one."""

    def __init__(self, answer: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.a, self.b, self.answer = nn.Linear(6, 8), nn.Linear(8, 5), answer

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.answer(self.b(self.a(x).relu()))


ANSWERS: dict[str, tuple[Callable[[Tensor], tuple[Tensor, ...]], bool]] = {
    "the best action and its value": (lambda y: (y.amax(-1), y.argmax(-1)), False),
    "both from one call": (lambda y: tuple(y.max(-1)), False),
    "flags": (lambda y: (y.sum(-1), y > 0), False),
    "whole numbers": (lambda y: (y.sum(-1), y.round().long()), False),
    "one of them as an input of another": (lambda y: (F.one_hot(y.argmax(-1), 5).sum(-1) + y.sum(-1), y > 0), False),
    "how many": (lambda y: (y.sum(-1), (y > 0).sum(-1)), True),
    "values alone": (lambda y: (y.amax(-1),), True),
}


def made(answer: Callable[[Tensor], tuple[Tensor, ...]]) -> nn.Module:
    torch.manual_seed(0)
    return disturbed(Answering(answer)).float()


@pytest.mark.parametrize("name", ANSWERS)
def test_every_returned_tensor_stays(name: str) -> None:
    answer, free = ANSWERS[name]
    model = made(answer)
    graph = mergeid.graph(model, X)
    assert only(graph, "a.weight", 0).size == 8
    assert bool(on(graph, "b.weight", 0)) == free
    before = model(X)
    for seed in range(4):
        element = graph.random_element(torch.Generator().manual_seed(seed))
        moved = made(answer)
        moved.load_state_dict(graph.apply_state(element, model.state_dict()))
        for one, other in zip(before, moved(X), strict=True):
            torch.testing.assert_close(other, one)


def test_a_graph_by_hand_is_checked_on_them_too() -> None:
    wrong = mergeid.graph(made(lambda y: (y.amax(-1),)), X).to_json()
    assert {s["size"] for s in wrong["spaces"]} == {8, 5}
    found = mergeid.graph(made(lambda y: (y.amax(-1), y.argmax(-1))), X, graph=wrong)
    assert [s.size for s in found.spaces] == [8]


def test_the_caller_may_leave_them_out() -> None:
    model = made(lambda y: (y.amax(-1), y.argmax(-1)))
    assert {s.size for s in mergeid.graph(model, X, outputs=["0"]).spaces} == {8, 5}
    assert {s.size for s in mergeid.graph(model, X, outputs=["1"]).spaces} == {8}
