"""Layer-wise matching in the manner of FedMA (Wang et al. 2020, "Federated learning with matched averaging").

Spaces are matched one after the other from the input on, by the weights that come from what is matched already (and by
biases and norms); what was decided is not looked at again. FedMA's matched average is that of the result; its neurons
that find no partner and its training between layers are not done here, as all models have one architecture.
"""

from __future__ import annotations

import numpy as np

from mergeid.matchers.assignment import TreeAssignment, descendants, roots
from mergeid.matchers.inner_products import WeightSimilarity
from mergeid.matchers.plain import PlainMatch, seen_plainly
from mergeid.matchers.protocol import MatchTask, Needs
from mergeid.matchers.schedule import neighbours, owners_of, shared_out, sharing, waves
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph, Space


def layerwise_matching(similarity: WeightSimilarity, *, workers: int | None = None) -> Element:
    """The element found in one pass; trees of spaces in the order in which the forward pass meets their tensors.

    Args:
        workers: threads for the assignments of trees that share no tensor; default: torch's number of threads."""
    graph = similarity.graph
    element = graph.identity()
    tops = in_order(graph)
    trees = [descendants(graph, root) for root in tops]
    inside = [{s.id for s in tree} for tree in trees]
    later: list[set[str]] = [set().union(*inside[k + 1 :]) for k in range(len(trees))]
    decided: list[set[str]] = [set().union(*inside[:k]) - set().union(*inside[k:]) for k in range(len(trees))]
    apart = [near | shared for near, shared in zip(neighbours(trees), sharing(trees), strict=True)]

    def scores_of(k: int) -> dict[str, np.ndarray] | PlainMatch:
        if (plain := seen_plainly(similarity, trees[k], element, decided[k])) is not None:
            return plain
        return {s.id: similarity.scores(s, element, known=decided[k] | (inside[k] - {s.id})) for s in trees[k]}

    def solved(k: int, scores: dict[str, np.ndarray] | PlainMatch) -> Element:
        if isinstance(scores, PlainMatch):
            return {tops[k].id: scores.perm}
        solver, top = TreeAssignment(graph, scores), tops[k]
        if not inside[k] & later[k]:
            found = solver.solve(top, element)
        else:  # what also lies in a later root goes where that goes
            found = {**element, top.id: solver.loosely(top, element, later[k])}
            for s in trees[k][1:]:
                if s.id not in later[k]:
                    found[s.id] = solver.choose(s, found)
        return {s.id: found[s.id] for s in trees[k] if s.id not in later[k]}

    planned = waves(range(len(trees)), apart)
    owners = owners_of(planned, trees)
    for wave in planned:
        for _, found in shared_out(wave, owners, scores_of, solved, workers):
            element = {**element, **found}
    return element


def in_order(graph: NeuronGraph) -> list[Space]:
    """Roots by the first of their tensors in the state dict: its order is that of the layers."""
    place = {name: i for i, name in enumerate(graph.tensors)}
    return sorted(roots(graph), key=lambda s: min(place[a.tensor] for t in descendants(graph, s) for a in t.axes))


class LayerwiseMatcher:
    """`layerwise_matching` as a matcher."""

    name = "layerwise"
    needs: Needs = "weights"

    def match(self, task: MatchTask) -> Element:
        return layerwise_matching(WeightSimilarity(task.graph, task.a, task.b))
