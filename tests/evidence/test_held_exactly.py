"""What holds neurons, in the cases that whole networks seldom show: beside brute force and by hand."""

from __future__ import annotations

from itertools import permutations
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mergeid
from mergeid.evidence.entries import entries
from mergeid.evidence.hold import Fixed, _diagonals, _products, _Rows, hold
from mergeid.evidence.writers import Writer, _unknown_inputs, writers_of
from mergeid.neuron_graph.neuron_graph import AxisMap, Space


def held(a: Tensor, b: Tensor, f: Tensor) -> tuple[Fixed, Space, list[Writer]]:
    n = len(f)
    axis = AxisMap("w", 0, np.arange(n))
    one, two = {"w": a - f, "w_fixed": f}, {"w": b - f, "w_fixed": f}
    space = Space("s", "s", n, 1, (), np.zeros((1, 0), np.int64), (axis,))
    return Fixed(lambda _, k: one.get(k), lambda _, k: two.get(k)), space, [Writer("w", axis, frozenset(), None)]


def only_cheapest(one: Tensor, two: Tensor) -> bool:
    """Whether no other order is as cheap as the identity."""
    costs = {p: float((one - two[list(p)]).square().sum()) for p in permutations(range(len(one)))}
    return all(cost > costs[tuple(range(len(one)))] for p, cost in costs.items() if p != tuple(range(len(one))))


@pytest.mark.parametrize("moved", [0.0, 1.0, 2.5, -1.5])
def test_neurons_that_all_moved_alike_are_held_although_each_lies_nearer_to_another(moved: float) -> None:
    f = torch.arange(5, dtype=torch.float64)[:, None] * torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    a, b = f + moved, f - moved
    assert only_cheapest(f, a) and only_cheapest(f, b) and only_cheapest(a, b)
    found = hold(*held(a, b, f))
    assert found.nearest == (True, True, True) and found.firm


def test_sums_of_rows_are_added_up_in_float64() -> None:
    g = torch.Generator().manual_seed(0)
    a, b, f = (1e4 + torch.randn(4, 50, generator=g) for _ in range(3))
    rows = _Rows(*held(a, b, f))
    whole = [x.double() for x in (*(held(a, b, f)[0].rows(rows.space, rows.writers[0])),) if x is not None]
    for x, y in ((0, 0), (2, 1)):
        torch.testing.assert_close(_diagonals(rows, x, y), (whole[x] * whole[y]).sum(1), rtol=1e-14, atol=0)
        found = _products(rows, x, y, torch.tensor([2, 0]))
        torch.testing.assert_close(found, whole[x][[2, 0]] @ whole[y].T, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("axis", "shape"), [(0, (4, 2)), (1, (2, 4)), (1, (2, 4, 3)), (0, (4, 2, 3))])
def test_a_writer_of_frozen_neurons_is_told_by_the_axis_that_it_sums_over(axis: int, shape: tuple[int, ...]) -> None:
    read, own = 1 - axis, AxisMap("m.weight", axis, np.arange(4))

    def told(covered: list[int], held: tuple[str, ...] = (), sizes: tuple[int, ...] = shape) -> str | None:
        lies = AxisMap("m.weight", read, np.array(covered))
        graph = SimpleNamespace(tensors={"m.weight": sizes}, on_tensor={"m.weight": [("s", own), ("t", lies)]})
        return _unknown_inputs(cast(Any, graph), own, held)

    assert told([0, 1]) is None
    said = told([0, -1])
    assert said is not None and "frozen" in said
    assert told([-1, -1], ("m",)) is None  # it reads the network's inputs
    single = tuple(1 if d == read else n for d, n in enumerate(shape))
    assert told([-1], (), single) is None  # one input has no order


class Scaled(nn.Module):
    """A gain in the shape of what it multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 2)
        self.gain = nn.Parameter(torch.rand(1, 8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last((self.first(x) * self.gain).relu())
        return found


def test_a_gain_writes_nothing() -> None:
    model, x = Scaled(), torch.randn(3, 5)
    graph = mergeid.graph(model, x)
    assert any(axis.tensor == "gain" for s in graph.spaces for axis in s.axes)
    (writers,) = writers_of(graph, model, {"first"}).values()
    assert [(w.tensor, w.unknown) for w in writers] == [("first.weight", None)]


def test_entries_draw_from_a_generator_of_their_own() -> None:
    model, x = Scaled(), torch.randn(3, 5)
    before = torch.get_rng_state()
    assert entries(model, x, lambda net, batch: net(batch)) == {"", "first"}
    assert torch.equal(torch.get_rng_state(), before)
