"""Activation matching: assign neurons by the correlation of their activations on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Generator

from mergeid.errors import MergeidError
from mergeid.graph.neuron_graph import Element, NeuronGraph, Space
from mergeid.match.assignment import TreeAssignment, roots
from mergeid.match.inner_products import WeightSimilarity
from mergeid.match.protocol import MatchTask, Needs
from mergeid.match.weight import weight_matching

WEIGHT_SHARE = 1.0
"""Weight of the cosine of the weights beside the correlation of the activations. A merge averages weights: two neurons
that behave alike but are built differently (twins in a fine-tune) are no pair. Between independent seeds the cosines
are near 0 for every pair, and the activations decide alone; silent neurons are placed by their weights."""


def activation_matching(graph: NeuronGraph, correlation: Mapping[str, np.ndarray]) -> Element:
    """The element that maximises the sum of correlations (Li et al. 2016; Git Re-Basin section 3.1).

    Args:
        correlation: space id -> [size, size] Pearson correlations of A's and B's activations; spaces that are missing
            follow their parents, or stay.
    """
    scores = {s.id: correlation.get(s.id, np.zeros((s.size, s.size))) for s in graph.spaces}
    solver = TreeAssignment(graph, scores)
    element = graph.identity()
    for root in roots(graph):
        element = solver.solve(root, element)
    return element


def combined_matching(
    similarity: WeightSimilarity,
    correlation: Mapping[str, np.ndarray],
    *,
    generator: Generator,
    passes: int = 8,
) -> Element:
    """Activation matching, refined by the weights where activations leave a choice, and weight matching for spaces
    whose activations cannot be read."""
    graph = similarity.graph

    def extra(space: Space) -> np.ndarray:
        found = correlation.get(space.id)
        return found if found is not None else np.zeros((space.size, space.size))

    start = activation_matching(graph, correlation)
    return weight_matching(
        similarity,
        generator=generator,
        element=start,
        extra=extra,
        cosine=True,
        weight=WEIGHT_SHARE,
        max_passes=passes,
    )


class ActivationMatcher:
    """`activation_matching` as a matcher."""

    name = "activation"
    needs: Needs = "activations"

    def match(self, task: MatchTask) -> Element:
        return activation_matching(task.graph, _correlation(task, self.name))


class CombinedMatcher:
    """`combined_matching` as a matcher."""

    name = "combined"
    needs: Needs = "activations"

    def match(self, task: MatchTask) -> Element:
        similarity = WeightSimilarity(task.graph, task.a, task.b)
        return combined_matching(similarity, _correlation(task, self.name), generator=task.generator)


def _correlation(task: MatchTask, name: str) -> Mapping[str, np.ndarray]:
    if task.correlation is None:
        raise MergeidError(f"matcher {name!r} needs the correlations of activations; give examples with --data")
    return task.correlation
