"""C²M³ (Crisostomi et al. 2024): five networks merged in one common order, beside sequences of pairwise merges, each
next network matched to the average so far."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from common import Bench, State, middle, task_of, with_state
from networks import Images, accuracy, run
from torch import nn

import mergeid
from mergeid.matchers import get_matcher
from mergeid.matchers.cycle import cycle_matching
from mergeid.matchers.joint import joint_matching
from mergeid.matchers.universe import relative
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph

SEQUENCES = 24
"""Of the 120 orders of five networks."""

Match = Callable[[nn.Module, nn.Module], Element]


def closes(graph: NeuronGraph, universe: Sequence[Element]) -> bool:
    """Whether the maps around a cycle of all models compose to the identity."""
    around: Element = graph.identity()
    for p, q in itertools.pairwise((0, 3, 1, 4, 2, 0)):
        step = relative(universe, p, q)
        around = {k: step[k][around[k]] for k in around}
    return all((p == np.arange(len(p))).all() for p in around.values())


def sequence(graph: NeuronGraph, models: Sequence[nn.Module], match: Match) -> nn.Module:
    """The models merged one after the other, with equal shares in the end."""
    so_far = models[0]
    for i, model in enumerate(models[1:], start=1):
        moved = graph.apply_state(match(so_far, model), model.state_dict())
        so_far = with_state(so_far, middle([so_far.state_dict(), moved], [i / (i + 1), 1 / (i + 1)]))
    return so_far


def five(bench: Bench, number: int) -> Mapping[str, float]:
    """One set of five networks. Sequences are chosen on held-out images with labels, the common order without labels;
    all rows are accuracies on other images."""
    models = [bench.network("perceptron", s) for s in range(5 * number, 5 * number + 5)]
    states = [m.state_dict() for m in models]
    graph = mergeid.graph(models[0], bench.test.x[:2])
    held_out, test = bench.held_out, bench.all_tests

    def score(model: nn.Module, images: Images = test) -> float:
        return accuracy(run(model, images.x), images.y)

    def merged(elements: Sequence[Element]) -> float:
        moved: list[State] = [graph.apply_state(e, s) for e, s in zip(elements, states, strict=True)]
        return score(with_state(models[0], middle(moved)))

    found = {
        "mean of the five": sum(map(score, models)) / 5,
        "average as they lie": merged([graph.identity()] * 5),
    }
    correlations = {
        (p, q): task_of(bench, graph, models[p], models[q]).correlation or {}
        for p, q in itertools.combinations(range(5), 2)
    }
    said = sum(run(m, bench.calibration.x).softmax(1) for m in models) / 5

    def judge(elements: Sequence[Element]) -> float:
        """Cross-entropy of the average against the mean prediction of the five."""
        moved = [graph.apply_state(e, s) for e, s in zip(elements, states, strict=True)]
        logits = run(with_state(models[0], middle(moved)), bench.calibration.x)
        return float(-(said * logits.log_softmax(1)).sum(1).mean())

    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    universes = {
        "activations and weights": joint_matching(graph, states, correlations, generator=generators[0], judge=judge),
        "weights": cycle_matching(graph, states, generator=generators[1]),
    }
    for (what, universe), name in zip(universes.items(), ("combined", "weight"), strict=True):
        assert closes(graph, universe)

        def match(a: nn.Module, b: nn.Module, name: str = name) -> Element:
            return get_matcher(name).match(task_of(bench, graph, a, b))

        found[f"matched to the first, {what}"] = merged([graph.identity(), *(match(models[0], m) for m in models[1:])])
        found[f"cycle-consistent, {what}"] = merged([relative(universe, 0, q) for q in range(5)])
        orders = list(itertools.permutations(range(5)))
        random.Random(0).shuffle(orders)
        made = [sequence(graph, [models[k] for k in order], match) for order in orders[:SEQUENCES]]
        found[f"best of {SEQUENCES} sequences, {what}"] = score(max(made, key=lambda m: score(m, held_out)))
        found[f"mean of {SEQUENCES} sequences, {what}"] = sum(map(score, made)) / len(made)
    return found
