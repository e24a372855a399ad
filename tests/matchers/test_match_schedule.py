"""Waves keep the order of what depends on each other; threads change no bit; descent in waves is descent one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graph_helpers import seeded, traced
from hypothesis import given, settings
from hypothesis import strategies as st
from test_match_cycle import graph_of, nested, states
from test_match_symmetries import Residual
from torch import Tensor

from mergeid.matchers import WeightSimilarity, weight_matching
from mergeid.matchers.activation import activation_matching, combined_matching
from mergeid.matchers.assignment import TreeAssignment, descendants, roots
from mergeid.matchers.layerwise import in_order, layerwise_matching
from mergeid.matchers.schedule import in_threads, neighbours, sharing, waves
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(0, 10_000))
def test_waves_hold_everything_once_and_keep_the_order(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    apart: list[set[int]] = [set() for _ in range(n)]
    for i, j in rng.integers(0, n, (n, 2)):
        apart[i].add(int(j))
        apart[j].add(int(i))
    order = rng.permutation(n).tolist()
    found = waves(order, apart)
    assert sorted(k for wave in found for k in wave) == list(range(n))
    at = {k: i for i, wave in enumerate(found) for k in wave}
    place = {k: i for i, k in enumerate(order)}
    for i in range(n):
        for j in apart[i] - {i}:
            assert (at[i] < at[j]) == (place[i] < place[j])
        # no later than it must be
        assert at[i] == 0 or any(at[j] == at[i] - 1 and place[j] < place[i] for j in apart[i])


def test_threads_keep_the_order_and_hold_few_items() -> None:
    held: list[int] = []
    most = 0

    def prepare(k: int) -> int:
        nonlocal most
        held.append(k)
        most = max(most, len(held))
        return k

    for workers in (1, 3):
        held.clear()
        out = []
        for k, value in in_threads(range(20), prepare, lambda item, prepared: item * prepared, workers):
            held.remove(k)
            out.append(value)
        assert out == [k * k for k in range(20)]
    assert most == 4

    def fail(item: int, prepared: int) -> None:
        raise RuntimeError("no assignment")

    with pytest.raises(RuntimeError, match="no assignment"):
        list(in_threads(range(3), prepare, fail, 2))


def one_by_one(similarity: WeightSimilarity, generator: torch.Generator) -> Element:
    """Git Re-Basin's algorithm 1 as it is written: one tree after the other, scores made anew."""
    graph = similarity.graph
    element = graph.identity()
    tops = roots(graph)
    trees = [descendants(graph, s) for s in tops]
    order = list(range(len(tops)))
    stale = set(order)
    while True:
        for k in order:
            if k not in stale:
                continue
            stale.discard(k)
            scores = {s.id: similarity.scores(s, element) for s in trees[k]}
            found = TreeAssignment(graph, scores).solve(tops[k], element)
            if similarity.objective(found) > similarity.objective(element) * (1 + 1e-6):
                element = found
                stale |= neighbours(trees)[k]
        if not stale:
            return element
        order = torch.randperm(len(tops), generator=generator).tolist()


def pairs() -> list[tuple[NeuronGraph, dict[str, Tensor], dict[str, Tensor]]]:
    """A residual network, nested heads, and a deep perceptron, each with another network of its kind."""
    model = seeded(Residual)
    deep = graph_of(6, 20, 16, 12, 10, 3)
    shapes = [
        (traced(model, (torch.randn(2, 2, 6, 6, dtype=torch.float64),)), dict(model.state_dict())),
        nested(),
        (deep, states(2, 6, 20, 16, 12, 10, 3)[0]),
    ]
    generator = torch.Generator().manual_seed(1)
    return [
        (g, a, {k: v + torch.randn(v.shape, generator=generator).to(v) if v.is_floating_point() else v
                for k, v in a.items()})
        for g, a in shapes
    ]  # fmt: skip


@pytest.mark.parametrize("which", [0, 1, 2])
def test_descent_in_waves_is_descent_one_by_one(which: int) -> None:
    graph, a, b = pairs()[which]
    similarity = WeightSimilarity(graph, a, b)
    wanted = one_by_one(similarity, torch.Generator().manual_seed(0))
    found = weight_matching(similarity, generator=torch.Generator().manual_seed(0))
    assert all(np.array_equal(found[k], wanted[k]) for k in wanted)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_two_workers_are_one_worker_bit_for_bit(which: int) -> None:
    graph, a, b = pairs()[which]
    rng = np.random.default_rng(0)
    correlation = {s.id: rng.uniform(-1, 1, (s.size, s.size)) for s in graph.spaces[::2]}
    similarity = WeightSimilarity(graph, a, b)

    def all_of(workers: int) -> list[Element]:
        def generator() -> torch.Generator:
            return torch.Generator().manual_seed(0)

        return [
            weight_matching(similarity, generator=generator(), workers=workers),
            layerwise_matching(similarity, workers=workers),
            activation_matching(graph, correlation, workers=workers),
            combined_matching(similarity, correlation, generator=generator(), workers=workers),
        ]

    for one, two in zip(all_of(1), all_of(2), strict=True):
        assert all(np.array_equal(one[k], two[k]) for k in one)


def test_trees_with_a_common_space_are_never_side_by_side() -> None:
    """Members of both parents: the choice of one is the other's."""
    graph, _, _ = pairs()[1]
    trees = [descendants(graph, s) for s in in_order(graph)]
    shared = sharing(trees)
    for k, tree in enumerate(trees):
        ids = {s.id for s in tree}
        assert shared[k] == {j for j, other in enumerate(trees) if j != k and ids & {s.id for s in other}}
