"""Activation matching: assign neurons by the correlation of their activations on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Generator

from mergeid.basics.when_asked import WhenAsked
from mergeid.errors import MergeidError
from mergeid.matchers.assignment import TreeAssignment, clusters, descendants
from mergeid.matchers.inner_products import WeightSimilarity
from mergeid.matchers.protocol import MatchTask, Needs
from mergeid.matchers.schedule import owners_of, shared_out
from mergeid.matchers.weight import weight_matching
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph, Space

WEIGHT_SHARE = 1.0
"""Weight of the cosine of the weights beside the correlation of the activations. A merge averages weights: two neurons
that behave alike but are built differently (twins in a fine-tune) are no pair. Between independent seeds the cosines
are near 0 for every pair, and the activations decide alone; silent neurons are placed by their weights."""


TIE_SHARE = 1e-3
"""The same of activation matching: enough to tell apart neurons that activations do not (silent ones, or those that
differ by a scale), and little enough to give up no more than 0.002 of the mean correlation."""


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
    together = clusters(graph)
    trees = [list({s.id: s for top in tops for s in descendants(graph, top)}.values()) for tops in together]
    start = graph.identity()

    def solved(k: int, start: Element) -> Element:
        found = solver.solve_together(together[k], start)
        return {s.id: found[s.id] for s in trees[k]}

    all_of_them = range(len(trees))
    element = dict(start)
    for _, found in shared_out(all_of_them, owners_of([all_of_them], trees), lambda _: start, solved, workers):
        element |= found
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
    """`activation_matching` as a matcher; where activations leave ties, the weights break them."""

    name = "activation"
    needs: Needs = "activations"

    def match(self, task: MatchTask) -> Element:
        similarity = WeightSimilarity(task.graph, task.a, task.b)
        found = _correlation(task, self.name)
        return combined_matching(similarity, found, generator=task.generator, share=TIE_SHARE)


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
