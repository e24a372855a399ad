"""What is plain to see is what the solver finds on all inner products; what is not plain is left to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graph_helpers import traced
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import mergeid.matchers.plain as plain_module
from mergeid.evidence.decide_weights import decide_from_weights
from mergeid.matchers import WeightSimilarity, weight_matching
from mergeid.matchers.layerwise import layerwise_matching
from mergeid.matchers.plain import plain_match, worth_looking
from mergeid.neuron_graph.group import same_element
from mergeid.neuron_graph.neuron_graph import NeuronGraph, Space

WIDTH = 1100


@pytest.fixture(scope="module")
def network() -> tuple[NeuronGraph, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4400, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 40)).double()
    return traced(model, (torch.randn(2, 4400, dtype=torch.float64),)), dict(model.state_dict())


def the_space(graph: NeuronGraph) -> Space:
    (space,) = (s for s in graph.spaces if s.size == WIDTH)
    return space


def partner(
    graph: NeuronGraph, a: dict[str, Tensor], seed: int, noise: float, spread: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A with neurons of other norms, and a scrambled copy of it with noise."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(spread * torch.randn(WIDTH, 1, generator=generator)).double()
    a = {k: v * scale if v.shape == (WIDTH, 4400) else v for k, v in a.items()}
    noisy = {k: v + noise * v.std() * torch.randn(v.shape, generator=generator) for k, v in a.items()}
    return a, graph.apply_state(graph.random_element(generator), noisy)


@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.integers(0, 10_000), st.floats(0, 0.5), st.floats(0, 0.4))
def test_plain_matches_are_the_best(network, seed: int, noise: float, spread: float) -> None:  # type: ignore[no-untyped-def]
    """Against SciPy's solver on float64 inner products."""
    graph, known = network
    a, b = partner(graph, known, seed, noise, spread)
    similarity, space = WeightSimilarity(graph, a, b), the_space(graph)
    assert worth_looking(similarity, space)
    found = plain_match(similarity, space, graph.identity())
    score = sum(
        similarity.factor[x.tensor] ** 2
        * (a[x.tensor].movedim(x.axis, 0).reshape(WIDTH, -1) @ b[x.tensor].movedim(x.axis, 0).reshape(WIDTH, -1).T)
        for x in space.axes
    ).numpy()  # type: ignore[union-attr]
    best = linear_sum_assignment(score, maximize=True)[1]
    if noise < 0.3 and spread < 0.2:
        assert found is not None
    if found is not None:
        rows = np.arange(WIDTH)
        assert np.array_equal(found.perm, best)
        gain = (score[rows, best] - score[rows, rows]).sum()
        assert found.gain == pytest.approx(gain, rel=1e-4)


def test_other_networks_are_not_plain(network) -> None:  # type: ignore[no-untyped-def]
    graph, a = network
    b = {k: torch.randn(v.shape, dtype=v.dtype, generator=torch.Generator().manual_seed(3)) for k, v in a.items()}
    assert plain_match(WeightSimilarity(graph, a, b), the_space(graph), graph.identity()) is None


def test_twins_are_not_plain(network) -> None:  # type: ignore[no-untyped-def]
    """Two neurons that are alike may both go to either place: the solver leaves them where they are."""
    graph, a = network
    twins = {k: v.clone() for k, v in a.items()}
    for v in twins.values():
        if v.shape == (WIDTH, 4400) or v.shape == (WIDTH,):
            v[7] = v[400]
        elif v.shape == (40, WIDTH):
            v[:, 7] = v[:, 400]
    similarity = WeightSimilarity(graph, twins, twins)
    assert plain_match(similarity, the_space(graph), graph.identity()) is None
    found = weight_matching(similarity, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(found[the_space(graph).id], np.arange(WIDTH))


def test_matchers_take_it(network, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """No product of all pairs is made where it is not needed, and the planted permutation comes out."""
    graph, known = network
    a, b = partner(graph, known, 5, 0.1, 0.1)
    space, planted = the_space(graph), plain_match(WeightSimilarity(graph, a, b), the_space(graph), graph.identity())
    assert planted is not None and planted.gain > 0

    def none(*_: object, **__: object) -> Tensor:
        raise AssertionError("multiplied out")

    monkeypatch.setattr(WeightSimilarity, "products", none)
    similarity = WeightSimilarity(graph, a, b)
    for found in (
        layerwise_matching(similarity),
        weight_matching(similarity, generator=torch.Generator().manual_seed(0)),
    ):
        assert np.array_equal(found[space.id], planted.perm)
        back = graph.apply_state(found, b)
        assert all(torch.nn.functional.cosine_similarity(back[k].flatten(), a[k].flatten(), 0) > 0.98 for k in a)


@settings(max_examples=4, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.integers(0, 10_000), st.floats(0.01, 0.25), st.sampled_from(["scrambled", "same", "some"]))
def test_decisions_that_are_plain_are_those_of_all_products(network, seed: int, noise: float, kind: str) -> None:  # type: ignore[no-untyped-def]
    graph, known = network
    a, b = partner(graph, known, seed, noise, 0.1)
    if kind != "scrambled":
        swap = graph.identity()
        if kind == "some":
            swap[the_space(graph).id] = np.r_[1, 0, np.arange(2, WIDTH)]
        generator = torch.Generator().manual_seed(seed)
        noisy = {k: v + noise * v.std() * torch.randn(v.shape, generator=generator) for k, v in a.items()}
        b = graph.apply_state(swap, noisy)
    similarity = WeightSimilarity(graph, a, b)
    plain = decide_from_weights(similarity, generator=torch.Generator().manual_seed(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_module, "LEAST_SIZE", WIDTH + 1)
        full = decide_from_weights(similarity, generator=torch.Generator().manual_seed(1))
    assert same_element(plain.element, full.element)
    for one, two in zip(plain.spaces, full.spaces, strict=True):
        assert (one.decision, one.moved) == (two.decision, two.moved)
        assert one.gain == (None if two.gain is None else pytest.approx(two.gain, rel=1e-4))
    assert [s.moved > 0 for s in plain.spaces] == [kind != "same"]
    assert "plainly" in plain.spaces[0].why and "plainly" not in full.spaces[0].why
