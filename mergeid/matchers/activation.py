"""Activation matching: assign neurons by the correlation of their activations on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Generator

from mergeid.basics.when_asked import WhenAsked
from mergeid.errors import MergeidError
from mergeid.matchers.assignment import TreeAssignment, descendants, roots
from mergeid.matchers.inner_products import WeightSimilarity
from mergeid.matchers.protocol import MatchTask, Needs
from mergeid.matchers.schedule import owners_of, shared_out, sharing, waves
from mergeid.matchers.weight import weight_matching
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph, Space

WEIGHT_SHARE = 1.0
"""Weight of the cosine of the weights beside the correlation of the activations. A merge averages weights: two neurons
that behave alike but are built differently (twins in a fine-tune) are no pair. Between independent seeds the cosines
are near 0 for every pair, and the activations decide alone; silent neurons are placed by their weights."""


def activation_matching(
    graph: NeuronGraph, correlation: Mapping[str, np.ndarray], *, workers: int | None = None
) -> Element:
    """The element that maximises the sum of correlations (Li et al. 2016; Git Re-Basin section 3.1).

    Args:
        correlation: space id -> [size, size] Pearson correlations of A's and B's activations; spaces that are missing
            follow their parents, or stay.
        workers: threads; default: torch's number.
    """
    sizes = {s.id: s.size for s in graph.spaces}
    scores = WhenAsked(
        list(sizes),
        lambda k: correlation[k] if k in correlation else np.zeros((sizes[k], sizes[k])),
        lambda found: int(found.nbytes),
    )
    solver = TreeAssignment(graph, scores)
    element = graph.identity()
    tops = roots(graph)
    trees = [descendants(graph, root) for root in tops]

    def solved(k: int, start: Element) -> Element:
        found = solver.solve(tops[k], start)
        return {s.id: found[s.id] for s in trees[k]}

    planned = waves(range(len(trees)), sharing(trees))
    owners = owners_of(planned, trees)
    for wave in planned:
        now = element
        for _, found in shared_out(wave, owners, lambda k, now=now: now, solved, workers):  # type: ignore[misc]
            element = {**element, **found}
    return element


def combined_matching(
    similarity: WeightSimilarity,
    correlation: Mapping[str, np.ndarray],
    *,
    generator: Generator,
    passes: int = 8,
    share: float = WEIGHT_SHARE,
    workers: int | None = None,
) -> Element:
    """Activation matching, refined by the weights where activations leave a choice, and weight matching for spaces
    whose activations cannot be read; `share` is the weight of the cosines, `workers` as in `weight_matching`."""
    graph = similarity.graph

    def extra(space: Space) -> np.ndarray:
        found = correlation.get(space.id)
        return found if found is not None else np.zeros((space.size, space.size))

    start = activation_matching(graph, correlation, workers=workers)
    return weight_matching(
        similarity,
        generator=generator,
        element=start,
        extra=extra,
        cosines=share,
        max_passes=passes,
        workers=workers,
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
