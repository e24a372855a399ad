"""Neurons that their activations do not tell apart, and spaces that must move together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_match_assignment import space, total
from torch import Tensor, nn

import mergeid
from mergeid.matchers.activation import activation_matching
from mergeid.matchers.assignment import TreeAssignment, clusters
from mergeid.neuron_graph.neuron_graph import NeuronGraph


def silent() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))
    with torch.no_grad():
        net[0].bias[::2] -= 100.0
    return net


def constant() -> nn.Module:
    """No input reaches these neurons: they say what their biases do."""
    net = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))
    with torch.no_grad():
        net[0].weight[1::3] = 0.0
        net[0].bias[1::3] += 5.0
    return net


def scaled() -> nn.Module:
    """Pairs that differ by a factor, which no correlation shows."""
    net = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))
    with torch.no_grad():
        net[0].weight[12:] = 3 * net[0].weight[:12]
        net[0].bias[12:] = 3 * net[0].bias[:12]
    return net


def narrow() -> nn.Module:
    """One number behind a squeeze: all that it reaches rises and falls with it."""
    return nn.Sequential(
        nn.Linear(6, 1), nn.Linear(1, 16), nn.Sigmoid(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)
    )


def steady() -> nn.Module:
    """Hidden units that hardly move, beside a large bias."""
    net = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))
    with torch.no_grad():
        net[0].weight[::2] *= 1e-5
        net[0].bias[::2] += 2.0
    return net


class Latent(nn.Module):
    """A learned query, whose entries no input reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.key = nn.Linear(6, 12), nn.Linear(12, 8)
        self.latent, self.query = nn.Parameter(torch.randn(1, 10)), nn.Linear(10, 8)
        self.last = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.read(x.reshape(len(x), 2, 6)).relu()
        weights = (self.key(h) * self.query(self.latent)).sum(-1, keepdim=True).softmax(1)
        return self.last((weights * h).sum(1))


class Grouped(nn.Module):
    """Two groups: the places inside a group and the groups move together."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(1, 6 * groups, 3),
            nn.ReLU(),
            nn.Conv1d(6 * groups, 4 * groups, 3, groups=groups),
            nn.ReLU(),
            nn.Conv1d(4 * groups, 4 * groups, 3, groups=groups),
            nn.ReLU(),
            nn.AdaptiveAvgPool1d(1),
        )
        self.last = nn.Linear(4 * groups, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.net(x[:, None]).flatten(1))


MAKES: dict[str, Callable[[], nn.Module]] = {
    "silent": silent,
    "constant": constant,
    "scaled": scaled,
    "narrow": narrow,
    "steady": steady,
    "latent": Latent,
    "two groups": Grouped,
    "three groups": lambda: Grouped(3),
}


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("seed", range(3))
def test_activations_alone_bring_a_permuted_copy_back(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    a, b = MAKES[name]().eval(), MAKES[name]().eval()
    inputs = torch.randn(96, 12)[:, : 12 if isinstance(a, (Latent, Grouped)) else 6]
    graph = mergeid.graph(a, inputs[:2])
    b.load_state_dict(graph.apply_state(graph.random_element(torch.Generator().manual_seed(seed)), a.state_dict()))
    data = [{"arg0": x} for x in inputs]
    kept = mergeid.merge(
        a, b, example_inputs=inputs[:2], data=data, match="always", matcher="activation", repair="none"
    ).state
    assert all(torch.equal(kept[name], value) for name, value in a.state_dict().items())


@pytest.mark.parametrize("matcher", ["activation", "combined", "weight", "layerwise"])
@pytest.mark.parametrize("count", [2, 3])
def test_a_noisy_copy_with_groups_comes_back(matcher: str, count: int) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        a, b, x = Grouped(count).eval(), Grouped(count).eval(), torch.randn(64, 12)
        graph = mergeid.graph(a, x[:2])
        element = graph.random_element(torch.Generator().manual_seed(seed))
        noisy = {k: v + 0.01 * v.std() * torch.randn_like(v) for k, v in a.state_dict().items()}
        b.load_state_dict(graph.apply_state(element, noisy))
        data = [{"arg0": row} for row in x]
        found = mergeid.plan(a, b, example_inputs=x[:2], data=data, match="always", matcher=matcher).element
        assert all(np.array_equal(found[k][order], np.arange(len(order))) for k, order in element.items()), seed


def groups(count: int, inside: int, after: int) -> NeuronGraph:
    """Groups of a convolution, with places inside them that all groups share, before and after it."""
    group, first, last = np.arange(count), np.arange(inside), np.arange(after)
    before = ("group", group.repeat(inside)), ("first", np.tile(first, count))
    behind = ("group", group.repeat(after)), ("last", np.tile(last, count))
    roots = [space("first", inside), space("group", count), space("last", after)]
    return NeuronGraph(
        "groups", {}, [*roots, space("in", count * inside, *before), space("out", count * after, *behind)], []
    )


@given(st.integers(2, 5), st.integers(2, 6), st.integers(2, 6), st.floats(0, 0.25), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_roots_that_share_what_lies_in_them_are_chosen_together(
    count: int, inside: int, after: int, noise: float, seed: int
) -> None:
    graph, rng = groups(count, inside, after), np.random.default_rng(seed)
    assert [[s.id for s in tops] for tops in clusters(graph)] == [["first", "group", "last"]]
    truth = graph.random_element(torch.Generator().manual_seed(seed))
    scores = {s.id: np.zeros((s.size, s.size)) for s in graph.spaces}
    for name in ("in", "out"):
        scores[name] = noise * rng.standard_normal(scores[name].shape)
        scores[name][np.arange(len(truth[name])), truth[name]] += 1
    found = activation_matching(graph, scores)
    assert graph.contains(found)
    assert total(scores, found) >= total(scores, truth) - 1e-9
    one_by_one, solver = graph.identity(), TreeAssignment(graph, scores)
    for tops in clusters(graph):
        for top in tops:
            one_by_one = solver.solve(top, one_by_one)
    assert total(scores, found) >= total(scores, one_by_one) - 1e-4


def test_ties_stay_where_they_are() -> None:
    graph = groups(3, 2, 4)
    scores = {s.id: np.ones((s.size, s.size)) for s in graph.spaces}
    found = activation_matching(graph, scores)
    assert all(np.array_equal(found[k], stays) for k, stays in graph.identity().items())
