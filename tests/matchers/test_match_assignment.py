"""Assignment of trees of spaces against every element of small groups."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeid.matchers.assignment import TreeAssignment
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph, Space

GROUPS, HEADS, WIDTH = 3, 2, 2


def space(name: str, size: int, *parents: tuple[str, np.ndarray]) -> Space:
    blocks = len(parents[0][1]) if parents else 1
    table = np.stack([p[1] for p in parents], 1) if parents else np.zeros((1, 0), np.int64)
    return Space(name, name, size, blocks, tuple(p[0] for p in parents), table, ())


def grouped_attention() -> NeuronGraph:
    """Key heads, with query heads and value dimensions inside, and the output projection's inputs inside both."""
    query, value = GROUPS * HEADS, GROUPS * WIDTH
    both = [(g * HEADS + h, g * WIDTH + d) for g in range(GROUPS) for h in range(HEADS) for d in range(WIDTH)]
    spaces = [
        space("key", GROUPS),
        space("query", query, ("key", np.arange(GROUPS))),
        space("value", value, ("key", np.arange(GROUPS))),
        space("out", len(both), *((n, np.array([b[k] for b in both])) for k, n in enumerate(("query", "value")))),
    ]
    return NeuronGraph("grouped", {}, spaces, [])


def elements(graph: NeuronGraph) -> list[Element]:
    """The whole group: 6 · 2³ · 2³."""
    found: list[Element] = [{}]
    for s in graph.spaces:
        found = [
            {**e, s.id: order}
            for e in found
            for inner in itertools.product(itertools.permutations(range(s.members)), repeat=s.blocks)
            for follow in [graph.follow(s, e).reshape(s.blocks, s.members)]
            for order in [np.concatenate([row[list(p)] for row, p in zip(follow, inner, strict=True)])]
        ]
    return found


def total(scores: dict[str, np.ndarray], element: Element) -> float:
    return sum(float(s[np.arange(len(s)), element[k]].sum()) for k, s in scores.items())


@cache  # no fixture: Hypothesis would print it all
def everything() -> tuple[NeuronGraph, list[Element]]:
    graph = grouped_attention()
    found = elements(graph)
    assert len(found) == 6 * 8 * 8
    assert all(graph.contains(e) for e in found[:20])
    return graph, found


@given(st.integers(0, 10_000), st.floats(0, 0.4), st.floats(0, 3))
@settings(max_examples=40, deadline=None)
def test_a_planted_element_is_the_optimum_from_any_start(seed: int, noise: float, offset: float) -> None:
    """What all pairs have in common (`offset`) changes no optimum."""
    graph, group = everything()
    rng = np.random.default_rng(seed)
    truth, start = group[rng.integers(len(group))], group[rng.integers(len(group))]
    scores = {}
    for s in graph.spaces:
        planted = np.zeros((s.size, s.size))
        planted[np.arange(s.size), truth[s.id]] = 1
        scores[s.id] = offset + planted + noise * rng.standard_normal(planted.shape)
    highest = max(group, key=lambda e: total(scores, e))
    found = TreeAssignment(graph, scores).solve(graph.spaces[0], start)
    assert graph.contains(found)
    if noise < 0.15:
        assert all(np.array_equal(found[k], truth[k]) for k in truth)
    # the heads and dimensions of a group are a product, which alternation may leave below its optimum, but not far
    assert total(scores, found) >= 0.9 * total(scores, highest)


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_without_a_space_in_two_others_the_optimum_is_exact(seed: int) -> None:
    graph, group = everything()
    rng = np.random.default_rng(seed)
    scores = {s.id: rng.standard_normal((s.size, s.size)) for s in graph.spaces}
    scores["out"][:] = 0
    found = TreeAssignment(graph, scores).solve(graph.spaces[0], graph.identity())
    assert total(scores, found) == pytest.approx(max(total(scores, e) for e in group))


@pytest.mark.parametrize("silent", ["key", "query", "value", "out"])
def test_one_silent_space_is_placed_by_the_others(silent: str) -> None:
    graph, group = everything()
    for truth in group[::17]:
        scores = {}
        for s in graph.spaces:
            scores[s.id] = np.zeros((s.size, s.size))
            if s.id != silent:
                scores[s.id][np.arange(s.size), truth[s.id]] = 1
        found = TreeAssignment(graph, scores).solve(graph.spaces[0], graph.identity())
        assert all(np.array_equal(found[k], truth[k]) for k in truth)


def twice_and_deeper() -> NeuronGraph:
    """Two blocks for every head and dimension of a group, and pairs inside these."""
    plain = grouped_attention()
    out = plain.by_id["out"]
    double = [(p, np.repeat(out.block_parents[:, k], 2)) for k, p in enumerate(out.parents)]
    spaces = [*plain.spaces[:3], space("out", 2 * out.size, *double)]
    spaces.append(space("deep", 4 * out.size, ("out", np.arange(2 * out.size))))
    return NeuronGraph("twice", {}, spaces, [])


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_what_lies_in_coupled_spaces_goes_where_they_go(seed: int) -> None:
    graph = twice_and_deeper()
    rng = np.random.default_rng(seed)
    scores = {s.id: rng.standard_normal((s.size, s.size)) for s in graph.spaces}
    assert graph.contains(TreeAssignment(graph, scores).solve(graph.spaces[0], graph.identity()))


@given(st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_a_planted_element_is_found_where_blocks_have_the_same_parents(seed: int) -> None:
    """Of the key heads nothing is known but what lies in them."""
    graph = twice_and_deeper()
    truth = graph.random_element(torch.Generator().manual_seed(seed))
    scores = {s.id: np.zeros((s.size, s.size)) for s in graph.spaces}
    for name in ("query", "value", "out", "deep"):
        scores[name][np.arange(len(truth[name])), truth[name]] = 1
    # other key heads would win if a second block could go where a first one is
    group = np.repeat(np.arange(GROUPS), len(truth["out"]) // GROUPS)
    scores["out"][1::2, 0::2] += 20.0 * (truth["key"][group][1::2, None] != group[None, 0::2])
    found = TreeAssignment(graph, scores).solve(graph.spaces[0], graph.identity())
    assert all(np.array_equal(found[k], truth[k]) for k in truth)
