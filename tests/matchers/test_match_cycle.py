"""Matching of several models: maps that compose to the identity, and the objective against brute force and chains."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from graph_helpers import composed, inverse, seeded, traced
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mergeid.matchers.cycle import _bound, _objective, cycle_matching, joint_objective
from mergeid.matchers.inner_products import WeightSimilarity
from mergeid.matchers.soft import apply_soft, hard, scaled, soft_element
from mergeid.matchers.universe import relative
from mergeid.matchers.weight import weight_matching
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph


def mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for i, (n, m) in enumerate(itertools.pairwise(widths)):
        layers += [nn.ReLU()] * (i > 0) + [nn.Linear(n, m)]
    return nn.Sequential(*layers)


def graph_of(*widths: int) -> NeuronGraph:
    return traced(seeded(lambda: mlp(*widths)), (torch.randn(2, widths[0], dtype=torch.float64),))


def states(count: int, *widths: int) -> list[dict[str, Tensor]]:
    return [dict(seeded(lambda: mlp(*widths), seed).float().state_dict()) for seed in range(count)]


def planted(
    graph: NeuronGraph, count: int, noise: float, *widths: int
) -> tuple[list[dict[str, Tensor]], list[Element]]:
    """One network with noise under random elements, and the elements that bring them back."""
    (first,) = states(1, *widths)
    generator = torch.Generator().manual_seed(7)
    out, truth = [], []
    for _ in range(count):
        element = graph.random_element(generator)
        near = {
            k: v + torch.randn(v.shape, generator=generator) * noise * v.square().mean().sqrt()
            for k, v in first.items()
        }
        out.append(graph.apply_state(element, near))
        truth.append(inverse(element))
    return out, truth


def test_cycles_close_and_no_chain_of_pairs_is_better() -> None:
    widths = (6, 20, 16, 3)
    graph = graph_of(*widths)
    models, truth = planted(graph, 5, 0.3, *widths)
    generator = torch.Generator().manual_seed(0)
    universe = cycle_matching(graph, models, generator=generator)
    assert all(graph.contains(e) for e in universe)
    for cycle in itertools.permutations(range(5), 5):
        around = graph.identity()
        for p, q in itertools.pairwise((*cycle, cycle[0])):
            around = composed(relative(universe, p, q), around)
        assert all(np.array_equal(p, np.arange(len(p))) for p in around.values())
    value = joint_objective(graph, models, universe)
    assert value >= joint_objective(graph, models, truth) - 1e-6 * abs(value)
    weights = scaled(graph, models)
    pair = {
        (p, q): weight_matching(WeightSimilarity(graph, weights[p], weights[q]), generator=generator)
        for p in range(5)
        for q in range(5)
        if p != q
    }
    for order in itertools.permutations(range(5)):
        chain: dict[int, Element] = {order[0]: graph.identity()}
        for p, q in itertools.pairwise(order):
            # q into the order of p, then as p went
            chain[q] = {k: pair[p, q][k][step] for k, step in chain[p].items()}
        assert value >= joint_objective(graph, models, [chain[p] for p in range(5)]) - 1e-6 * abs(value)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_planted_elements_come_back(noise: float) -> None:
    widths = (6, 20, 16, 3)
    graph = graph_of(*widths)
    models, truth = planted(graph, 3, noise, *widths)
    universe = cycle_matching(graph, models, generator=torch.Generator().manual_seed(0))
    for p, q in itertools.permutations(range(3), 2):
        wanted, found = relative(truth, p, q), relative(universe, p, q)
        assert all(np.array_equal(wanted[k], found[k]) for k in wanted)


def test_against_brute_force() -> None:
    """Three models with one space of four: all 24² relative elements."""
    graph = graph_of(3, 4, 2)
    (space,) = graph.spaces
    models = states(3, 3, 4, 2)
    every = [np.array(p) for p in itertools.permutations(range(4))]
    best = max(
        joint_objective(graph, models, [graph.identity(), {space.id: p}, {space.id: q}])
        for p, q in itertools.product(every, every)
    )
    universe = cycle_matching(graph, models, generator=torch.Generator().manual_seed(0))
    assert joint_objective(graph, models, universe) == pytest.approx(best, rel=1e-6)


def test_nothing_is_searched_where_little_can_be_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(3, 8, 2)
    models, truth = planted(graph, 3, 0.05, 3, 8, 2)

    def none(*_: object) -> list[Element]:
        raise AssertionError("searched")

    monkeypatch.setattr("mergeid.matchers.cycle._frank_wolfe", none)
    universe = cycle_matching(graph, models, generator=torch.Generator().manual_seed(0))
    for p, q in itertools.permutations(range(3), 2):
        wanted, found = relative(truth, p, q), relative(universe, p, q)
        assert all(np.array_equal(wanted[k], found[k]) for k in wanted)
    with pytest.raises(AssertionError, match="searched"):
        cycle_matching(graph, states(3, 3, 8, 2), generator=torch.Generator().manual_seed(0))


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_no_order_is_better_than_the_bound(seed: int) -> None:
    graph = graph_of(3, 6, 2)
    weights = scaled(graph, states(3, 3, 6, 2))
    drawn = [graph.random_element(torch.Generator().manual_seed(3 * seed + i)) for i in range(3)]
    assert _objective(graph, weights, drawn) <= _bound(graph, weights) * (1 + 1e-9)
    same = [weights[0]] * 3
    assert _objective(graph, same, [graph.identity()] * 3) == pytest.approx(_bound(graph, same))


def test_objective_is_what_a_loop_says() -> None:
    graph = graph_of(3, 4, 2)
    models = states(3, 3, 4, 2)
    universe = [graph.random_element(torch.Generator().manual_seed(i)) for i in range(3)]
    expected = 0.0
    for name in graph.on_tensor:
        moved = [graph.apply(e, name, m[name]).double().numpy() for e, m in zip(universe, models, strict=True)]
        square = np.mean([np.mean(m**2) for m in moved])
        expected += sum(float((x * y).sum()) for x, y in itertools.combinations(moved, 2)) / square
    assert joint_objective(graph, models, universe) == pytest.approx(expected, rel=1e-5)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 12)
        self.outer = nn.Linear(12, 12)
        self.qkv = nn.Linear(6, 36)
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 3, 4).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(*x.shape[:2], 12))


def nested() -> tuple[NeuronGraph, dict[str, Tensor]]:
    model = seeded(Attention)
    graph = traced(model, (torch.randn(2, 5, 6, dtype=torch.float64),))
    assert any(s.parents for s in graph.spaces)
    return graph, dict(model.state_dict())


def test_soft_permutations_are_the_group_element() -> None:
    graph, state = nested()
    element = graph.random_element(torch.Generator().manual_seed(2))
    soft = hard(element, torch.float64)
    for name in graph.on_tensor:
        assert torch.equal(apply_soft(graph, soft, name, state[name]), graph.apply(element, name, state[name]))


def test_soft_elements_are_doubly_stochastic_and_sharpen_to_the_group() -> None:
    graph, _ = nested()
    generator = torch.Generator().manual_seed(3)
    logits = {s.id: torch.randn(s.size, s.size, generator=generator) for s in graph.spaces}
    for matrix in soft_element(graph, logits, 200).values():
        for axis in (0, 1):
            assert torch.allclose(matrix.sum(axis), torch.ones(len(matrix)), atol=1e-3)
    element = graph.random_element(generator)
    sharp = soft_element(graph, {k: 50 * m for k, m in hard(element).items()}, 20)
    for k, m in hard(element).items():
        assert torch.allclose(sharp[k], m, atol=1e-6)


def test_several_with_heads() -> None:
    graph, state = nested()
    generator = torch.Generator().manual_seed(4)
    truth, models = [], []
    for _ in range(3):
        element = graph.random_element(generator)
        models.append(graph.apply_state(element, state))
        truth.append(inverse(element))
    universe = cycle_matching(graph, models, generator=generator)
    for p, q in itertools.permutations(range(3), 2):
        wanted, found = relative(truth, p, q), relative(universe, p, q)
        assert all(np.array_equal(wanted[k], found[k]) for k in wanted)


@pytest.mark.slow
def test_five_trained_networks_against_sequences_of_merges() -> None:
    """On scikit-learn's digits: the merge in one common order against networks merged one after the other, each matched
    to the average so far, in twelve orders. Its objective is higher than every sequence's; and it is no worse than the
    best of them, chosen on one half of the held-out digits and compared on the other, by two standard errors."""
    from sklearn.datasets import load_digits

    x, y = (torch.from_numpy(v) for v in load_digits(return_X_y=True))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order].float() / 8 - 1, y[order].long()
    models = []
    for seed in range(5):
        model = seeded(lambda: mlp(64, 128, 128, 10), seed).float()
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
        batches = torch.Generator().manual_seed(seed)
        for _ in range(25):
            for index in torch.randperm(1297, generator=batches).split(100)[:12]:
                optimiser.zero_grad()
                nn.functional.cross_entropy(model(x[index]), y[index]).backward()
                optimiser.step()
        models.append({k: v.detach().clone() for k, v in model.state_dict().items()})
    graph = graph_of(64, 128, 128, 10)

    def right(moved: list[dict[str, Tensor]]) -> np.ndarray:
        model.load_state_dict({k: torch.stack([m[k] for m in moved]).mean(0) for k in moved[0]})
        with torch.no_grad():
            return (model(x[1297:]).argmax(1) == y[1297:]).numpy()

    def moved(universe: list[Element]) -> list[dict[str, Tensor]]:
        return [graph.apply_state(e, m) for e, m in zip(universe, models, strict=True)]

    universe = cycle_matching(graph, models, generator=torch.Generator().manual_seed(0))
    value, ours = joint_objective(graph, models, universe), right(moved(universe))
    assert ours.mean() > 0.9 > right(models).mean()
    orders, chains = list(itertools.permutations(range(5))), []
    for k in np.random.default_rng(0).permutation(len(orders))[:12]:
        first, *rest = orders[k]
        so_far, element = models[first], {first: graph.identity()}
        for i, q in enumerate(rest, start=1):
            pair = WeightSimilarity(graph, so_far, models[q])
            element[q] = weight_matching(pair, generator=torch.Generator().manual_seed(0))
            next_one = graph.apply_state(element[q], models[q])
            so_far = {name: (i * v + next_one[name]) / (i + 1) for name, v in so_far.items()}
        chain = [element[q] for q in range(5)]
        assert value > joint_objective(graph, models, chain)
        chains.append(right(moved(chain)))
    theirs = max(chains, key=lambda found: found[:250].sum())[250:]
    ours = ours[250:]
    assert theirs.sum() - ours.sum() <= 2 * np.sqrt((ours != theirs).sum())
