"""Matching of N models by activations and weights: cycles close, planted elements come back, no start is better."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from graph_helpers import composed, seeded, traced
from test_match_cycle import graph_of, mlp, planted, states
from torch import Tensor

import mergeid
from mergeid.matchers import MatchTask, WeightSimilarity, combined_matching, get_matcher
from mergeid.matchers.joint import Correlations, joint_matching, joint_value
from mergeid.matchers.soft import scaled
from mergeid.matchers.universe import relative
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph

WIDTHS = (6, 20, 16, 3)


def measured(graph: NeuronGraph, models: list[dict[str, Tensor]]) -> Correlations:
    """Correlations of real activations after each ReLU, made by NumPy."""
    x = torch.randn(200, WIDTHS[0], generator=torch.Generator().manual_seed(5))
    hidden = []
    for state in models:
        model = mlp(*WIDTHS).float()
        model.load_state_dict(state)
        with torch.no_grad():
            hidden.append([model[:2](x).numpy(), model[:4](x).numpy()])

    def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = ((h - h.mean(0)) / np.maximum(h.std(0), 1e-12) for h in (a, b))
        return a.T @ b / len(a)

    ids = {s.size: s.id for s in graph.spaces}
    return {
        (p, q): {ids[h.shape[1]]: correlation(h, g) for h, g in zip(hidden[p], hidden[q], strict=True)}
        for p, q in itertools.combinations(range(len(models)), 2)
    }


def stars(graph: NeuronGraph, models: list[dict[str, Tensor]], found: Correlations) -> list[list[Element]]:
    """Everything matched to one model, for every such model."""
    weights = scaled(graph, models)
    every = range(len(models))
    out = []
    for c in every:
        between = {q: found[c, q] if c < q else {k: x.T for k, x in found[q, c].items()} for q in every if q != c}
        out.append([
            graph.identity() if q == c else combined_matching(
                WeightSimilarity(graph, weights[c], weights[q]), between[q], generator=torch.Generator().manual_seed(0)
            )
            for q in every
        ])  # fmt: skip
    return out


def test_cycles_close_and_no_star_is_better() -> None:
    graph = graph_of(*WIDTHS)
    models = states(4, *WIDTHS)
    found = measured(graph, models)
    universe = joint_matching(graph, models, found, generator=torch.Generator().manual_seed(0))
    assert all(graph.contains(e) for e in universe)
    for cycle in itertools.permutations(range(4)):
        around = graph.identity()
        for p, q in itertools.pairwise((*cycle, cycle[0])):
            around = composed(relative(universe, p, q), around)
        assert all(np.array_equal(p, np.arange(len(p))) for p in around.values())
    weights = scaled(graph, models)
    value = joint_value(graph, weights, found, universe)
    for star in stars(graph, models, found):
        assert value > joint_value(graph, weights, found, star)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_planted_elements_come_back(noise: float) -> None:
    graph = graph_of(*WIDTHS)
    models, truth = planted(graph, 3, noise, *WIDTHS)
    universe = joint_matching(graph, models, measured(graph, models), generator=torch.Generator().manual_seed(0))
    for p, q in itertools.permutations(range(3), 2):
        wanted, found = relative(truth, p, q), relative(universe, p, q)
        assert all(np.array_equal(wanted[k], found[k]) for k in wanted)


def test_of_two_models_it_is_combined_matching() -> None:
    graph = graph_of(*WIDTHS)
    models = states(2, *WIDTHS)
    found = measured(graph, models)
    task = MatchTask(graph, models[0], models[1], torch.Generator().manual_seed(0), found[0, 1])
    cycle, combined = (get_matcher(name).match(task) for name in ("cycle", "combined"))
    assert all(np.array_equal(cycle[k], combined[k]) for k in combined)


def test_the_end_that_is_judged_nearest_is_taken() -> None:
    graph = graph_of(*WIDTHS)
    models = states(3, *WIDTHS)
    found = measured(graph, models)
    seen: list[list[Element]] = []

    def judge(universe: Sequence[Element]) -> float:
        seen.append(list(universe))
        return abs(len(seen) - 4)

    taken = joint_matching(graph, models, found, generator=torch.Generator().manual_seed(0), judge=judge)
    assert len(seen) == 6  # a star of every model, with two weights of the cosines
    for q, element in enumerate(taken):
        wanted = relative(seen[3], 0, q)
        assert all(np.array_equal(wanted[k], element[k]) for k in wanted)


def test_value_is_what_a_loop_says() -> None:
    graph = graph_of(3, 4, 2)
    models = states(3, 3, 4, 2)
    (space,) = graph.spaces
    rng = np.random.default_rng(0)
    found = {pq: {space.id: rng.uniform(-1, 1, (4, 4))} for pq in itertools.combinations(range(3), 2)}
    universe = [graph.random_element(torch.Generator().manual_seed(i)) for i in range(3)]

    def neuron(p: int, q: int, place: int) -> np.ndarray:
        """Of model p, each tensor divided by its root mean square over both."""
        k = universe[p][space.id][place]
        parts = {"0.weight": np.s_[k], "0.bias": np.s_[k : k + 1], "2.weight": np.s_[:, k]}
        scale = {n: np.sqrt(np.mean([np.square(models[m][n].numpy()).mean() for m in (p, q)])) for n in parts}
        return np.concatenate([models[p][n].numpy()[where] / scale[n] for n, where in parts.items()])

    wanted = 0.0
    for (p, q), place in itertools.product(found, range(4)):
        wanted += found[p, q][space.id][universe[p][space.id][place], universe[q][space.id][place]]
        x, y = neuron(p, q, place), neuron(q, p, place)
        wanted += x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    assert joint_value(graph, scaled(graph, models), found, universe) == pytest.approx(wanted, rel=1e-5)


def test_three_models_and_data_from_the_outside(tmp_path: Path) -> None:
    """The verb gives cycle matching the activations: scrambled copies whose weights say nothing come back."""
    model = seeded(lambda: mlp(*WIDTHS)).float()
    graph = traced(model, (torch.randn(2, WIDTHS[0]),))
    x = torch.randn(64, WIDTHS[0], generator=torch.Generator().manual_seed(5))
    copies = []
    for seed in range(2):
        element = graph.random_element(torch.Generator().manual_seed(seed))
        other = mlp(*WIDTHS).float()
        other.load_state_dict(graph.apply_state(element, model.state_dict()))
        copies.append(other)
    result = mergeid.merge(
        [model, *copies], data=[{"arg0": row} for row in x], matcher="cycle", match="always", example_inputs=x[:2]
    )
    assert result.state is not None
    assert all(torch.allclose(v, result.state[k], atol=1e-6) for k, v in model.state_dict().items())
