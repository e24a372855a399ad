"""Layer-wise matching in the manner of FedMA (Wang et al. 2020, "Federated learning with matched averaging").

Spaces are matched one after the other from the input on, by the weights that come from what is matched already (and by
biases and norms); what was decided is not looked at again. FedMA's matched average is that of the result; its neurons
that find no partner and its training between layers are not done here, as all models have one architecture.
"""

from __future__ import annotations

from mergeid.graph.neuron_graph import Element, NeuronGraph, Space
from mergeid.match.assignment import TreeAssignment, descendants, roots
from mergeid.match.inner_products import WeightSimilarity
from mergeid.match.protocol import MatchTask, Needs


def layerwise_matching(similarity: WeightSimilarity) -> Element:
    """The element found in one pass; trees of spaces in the order in which the forward pass meets their tensors."""
    graph = similarity.graph
    element = graph.identity()
    decided: set[str] = set()
    for root in in_order(graph):
        tree = descendants(graph, root)
        inside = {s.id for s in tree}
        scores = {s.id: similarity.scores(s, element, known=decided | (inside - {s.id})) for s in tree}
        element = TreeAssignment(graph, scores).solve(root, element)
        decided |= inside
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
