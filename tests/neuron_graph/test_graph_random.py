"""Random networks: no graph that the tracer accepts may change its function."""

from __future__ import annotations

import pytest
import torch
from graph_helpers import disturbed, floats, traced, worst_change
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from random_networks import OPERATIONS, Network, Several, Step

import mergeid

STEP = st.tuples(st.sampled_from(sorted(OPERATIONS)), *(st.integers(0, 11) for _ in range(3)))
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def check(steps: list[Step], rows: int = 3) -> None:
    torch.manual_seed(len(steps))
    x = torch.randn(rows, 4)
    model = disturbed(Network(steps, x))
    x = x.double()
    with torch.no_grad():
        out = model(x)
    assume(bool(torch.isfinite(out).all()) and float(out.abs().max()) > 1e-6)
    graph = traced(model, (x,))
    assert graph.unknown_ops == {}
    assert worst_change(graph, model, (x,)) < 1e-7


def check_several(steps: list[Step], returned: list[tuple[int, int]], nest: int, rows: int) -> None:
    """No output may change, wherever it stands in what the network returns; verification agrees and freezes nothing."""
    torch.manual_seed(len(steps))
    x = torch.randn(rows, 4)
    model = disturbed(Several(steps, x, returned, nest))
    x = x.double()
    with torch.no_grad():
        outs = floats(model(x))
    assume(all(bool(torch.isfinite(out).all()) and float(out.abs().max()) > 1e-6 for out in outs))
    graph = traced(model, (x,))
    assert worst_change(graph, model, (x,)) < 1e-7
    found = mergeid.graph(model, x)
    assert worst_change(found, model, (x,)) < 1e-7


FOUND = {
    "a write makes rows differ that were alike": [("fill", 0, 0, 0)],
    "blocks of one space on different numbers of positions": [("pad", 0, 0, 10), ("chunk", 0, 1, 2)],
    "a stack of a tensor and its mirror image": [("activation", 0, 0, 0), ("stack", 0, 0, 0)],
    "neurons beside what became of them": [("activation", 0, 0, 0), ("cat", 0, 1, 1)],
    "a common quotient in which no label of the trace lies": [
        ("turn", 0, 0, 0), ("scale", 0, 0, 0), ("parts", 0, 0, 1), ("outer", 0, 0, 0), ("parts", 8, 1, 0),
    ],
    "a member that two others put into two members of one space": [
        ("activation", 0, 0, 0), ("parts", 0, 0, 2), ("add", 0, 1, 0), ("activation", 0, 0, 0),
    ],
    "a write into one of several copies": [("cut", 0, 1, 2), ("pick", 0, 1, 2), ("write", 0, 1, 0)],
}  # fmt: skip
"""Steps that once gave a wrong graph."""


@pytest.mark.parametrize("case", FOUND)
@pytest.mark.parametrize("rows", [1, 3])
def test_networks_that_were_wrong_once(case, rows):
    for width in range(6):
        check([("linear", 0, width, 0), *FOUND[case]], rows)


@settings(max_examples=120, derandomize=True, **QUIET)
@given(st.lists(STEP, min_size=2, max_size=9))
def test_random_networks_are_sound(steps):
    check([("linear", 0, len(steps) % 6, 0), *steps])


RETURNED = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=4)


@settings(max_examples=60, derandomize=True, **QUIET)
@given(st.lists(STEP, min_size=2, max_size=7), RETURNED, st.integers(0, 3), st.integers(1, 3))
def test_random_networks_with_several_outputs_are_sound(steps, returned, nest, rows):
    check_several([("linear", 0, len(steps) % 6, 0), *steps], returned, nest, rows)


@pytest.mark.slow
@settings(max_examples=6000, **QUIET)
@given(st.lists(STEP, min_size=2, max_size=10), RETURNED, st.integers(0, 3), st.integers(1, 4))
def test_many_random_networks_with_several_outputs_are_sound(steps, returned, nest, rows):
    check_several([("linear", 0, len(steps) % 6, 0), *steps], returned, nest, rows)


@pytest.mark.slow
@settings(max_examples=6000, **QUIET)
@given(st.lists(STEP, min_size=2, max_size=14), st.integers(1, 4))
def test_many_random_networks_are_sound(steps, rows):
    check([("linear", 0, len(steps) % 6, 0), *steps], rows)
