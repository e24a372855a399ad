"""Sinkhorn re-basin, OT fusion and the straight-through estimator on planted permutations and small problems."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from graph_helpers import inverse, seeded
from test_match_cycle import graph_of, mlp, nested, planted, states
from torch import Tensor, nn

from mergeid.errors import MergeidError
from mergeid.matchers import MatchTask, Training, get_matcher
from mergeid.matchers.soft import doubly_stochastic, log_sinkhorn
from mergeid.matchers.transport import transport, transported


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_sinkhorn_sums_and_scaling() -> None:
    """Doubly stochastic, and a scaling of the kernel: every 2x2 minor keeps its cross ratio."""
    logits = torch.randn(6, 6, generator=generator(), dtype=torch.float64)
    out = log_sinkhorn(logits, 300)
    for axis in (0, 1):
        assert torch.allclose(out.exp().sum(axis), torch.ones(6, dtype=torch.float64), atol=1e-10)
    for x in (logits, out):
        x -= x[:, :1].clone()
        x -= x[:1].clone()
    assert torch.allclose(out, logits, atol=1e-9)


@pytest.mark.parametrize("shape", [(5, 5), (2, 3, 4, 4)])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_implicit_gradient_is_that_of_many_iterations(shape: tuple[int, ...], temperature: float) -> None:
    noise = torch.Generator().manual_seed(3)
    logits = (torch.randn(shape, generator=noise, dtype=torch.float64) / temperature).requires_grad_()
    weight = torch.randn(shape, generator=noise, dtype=torch.float64)

    def loss(p: Tensor) -> Tensor:
        return (weight * p + p.square()).sum()

    (expected,) = torch.autograd.grad(loss(log_sinkhorn(logits, 2000).exp()), logits)
    (found,) = torch.autograd.grad(loss(doubly_stochastic(logits, 2000)), logits)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # the iterations end within 1e-6


@pytest.mark.parametrize("name", ["sinkhorn", "ot", "layerwise"])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_planted(name: str, noise: float) -> None:
    widths = (8, 16, 12, 4)
    graph = graph_of(*widths)
    (a, b), truth = planted(graph, 2, noise, *widths)
    wanted = {k: truth[1][k][inverse(truth[0])[k]] for k in truth[0]}
    found = get_matcher(name).match(MatchTask(graph, a, b, generator()))
    assert all(np.array_equal(found[k], wanted[k]) for k in wanted)


@pytest.mark.parametrize("name", ["sinkhorn", "ot", "cycle", "weight", "layerwise"])
def test_heads_and_what_lies_in_them(name: str) -> None:
    graph, state = nested()
    element = graph.random_element(generator())
    found = get_matcher(name).match(MatchTask(graph, state, graph.apply_state(element, state), generator()))
    assert graph.contains(found)
    assert all(np.array_equal(found[k], p) for k, p in inverse(element).items())


def test_sinkhorn_against_brute_force() -> None:
    """Noise of half the weights' size: the nearest permutation need no longer be the planted one."""
    graph = graph_of(3, 5, 2)
    (space,) = graph.spaces
    (a, b), _ = planted(graph, 2, 0.5, 3, 5, 2)

    def distance(perm: np.ndarray) -> float:
        moved = graph.apply_state({space.id: perm}, b)
        square = {k: (a[k].square().mean() + b[k].square().mean()) / 2 for k in a}
        return sum(float(((a[k] - moved[k]).square() / square[k]).sum()) for k in a)

    best = min(distance(np.array(p)) for p in itertools.permutations(range(5)))
    found = get_matcher("sinkhorn").match(MatchTask(graph, a, b, generator()))
    assert distance(found[space.id]) == pytest.approx(best, rel=1e-5)


def test_transport_is_the_optimum_of_its_cost_as_the_entropy_vanishes() -> None:
    from scipy.optimize import linear_sum_assignment

    graph = graph_of(3, 5, 2)
    (space,) = graph.spaces
    a, b = states(2, 3, 5, 2)
    correlation = np.random.default_rng(1).uniform(-1, 1, (5, 5))
    task = MatchTask(graph, a, b, generator(), {space.id: correlation})
    soft = transport(task, regularisation=0.005, iterations=2000)[space.id]
    assert torch.allclose(soft.sum(0), torch.ones(5), atol=1e-4)
    rows, columns = linear_sum_assignment(-correlation)
    assert np.array_equal(soft.argmax(1).numpy(), columns)
    assert float((soft.numpy() * correlation).sum()) == pytest.approx(correlation[rows, columns].sum(), abs=0.02)


def test_transported_by_a_permutation_is_the_same_function() -> None:
    graph = graph_of(8, 16, 12, 4)
    (a, b), _ = planted(graph, 2, 0.0, 8, 16, 12, 4)
    soft = transport(MatchTask(graph, a, b, generator()), regularisation=0.002, iterations=500)
    assert all(torch.allclose(v, a[k], atol=1e-3) for k, v in transported(graph, soft, b).items())


def task_with_labels() -> tuple[MatchTask, list[dict[str, Tensor]]]:
    graph = graph_of(4, 12, 3)
    x = torch.randn(128, 4, generator=generator())
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    trained = []
    for seed in range(2):
        model = seeded(lambda: mlp(4, 12, 3), seed).float()
        optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(150):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimiser.step()
        trained.append({k: v.detach().clone() for k, v in model.state_dict().items()})
    model.load_state_dict(trained[0])

    def batches() -> Iterator[dict[str, Tensor]]:
        for i in range(0, 128, 32):
            yield {"x": x[i : i + 32], "labels": y[i : i + 32]}

    def loss(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(output, batch["labels"])

    training = Training(model, lambda m, batch: m(batch["x"]), loss, batches)
    return MatchTask(graph, *trained, generator(), None, training), trained


def test_straight_through_lowers_the_midpoint_loss() -> None:
    task, (a, b) = task_with_labels()
    training = task.training
    assert training is not None

    def midpoint(element: dict[str, np.ndarray]) -> float:
        moved = task.graph.apply_state(element, b)
        model = mlp(4, 12, 3)
        model.load_state_dict({k: (v + moved[k]) / 2 for k, v in a.items()})
        with torch.no_grad():
            found = [training.loss(model(batch["x"]), batch) for batch in training.batches()]
        return float(torch.stack(found).mean())

    before = {k: v.clone() for k, v in training.model.state_dict().items()}
    found = get_matcher("straight_through").match(task)
    assert task.graph.contains(found)
    by_weights = get_matcher("weight").match(MatchTask(task.graph, a, b, generator()))
    assert midpoint(found) <= midpoint(by_weights) + 1e-6
    assert midpoint(found) < midpoint(task.graph.identity())
    assert all(torch.equal(v, before[k]) for k, v in training.model.state_dict().items())


def test_straight_through_without_labels() -> None:
    graph = graph_of(3, 5, 2)
    a, b = states(2, 3, 5, 2)
    with pytest.raises(MergeidError, match="labelled examples with --data"):
        get_matcher("straight_through").match(MatchTask(graph, a, b, generator()))
    model = mlp(3, 5, 2)
    training = Training(
        model, lambda m, batch: m(batch["x"]), lambda o, b: None, lambda: iter([{"x": torch.ones(2, 3)}])
    )
    with pytest.raises(MergeidError, match="gives none"):
        get_matcher("straight_through").match(MatchTask(graph, a, b, generator(), None, training))


@pytest.mark.parametrize("name", ["sinkhorn", "ot", "cycle", "straight_through"])
def test_same_seed_same_match(name: str) -> None:
    task, (a, b) = task_with_labels()
    found = [get_matcher(name).match(MatchTask(task.graph, a, b, generator(), None, task.training)) for _ in range(2)]
    assert all(np.array_equal(found[0][k], found[1][k]) for k in found[0])
