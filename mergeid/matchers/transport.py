"""OT fusion (Singh and Jaggi 2020, "Model fusion via optimal transport"), for layers of equal width.

Space by space, parents first, the entropic optimal transport plan between A's and B's neurons with uniform masses; the
next space sees B's weights transported by the plans so far. The cost is 1 − the correlation of the activations where
there are any, else 1 − the cosine of the weights. A plan times the width is doubly stochastic: a soft element. It can
be applied as it is (`transported`: every neuron of the result is a mix of B's, so that the function of B is not kept)
or be rounded to the group, as a matcher does.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mergeid.matchers.assignment import best_element
from mergeid.matchers.protocol import MatchTask, Needs
from mergeid.matchers.soft import apply_soft, scaled, soft_element
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph, Space


def transport(
    task: MatchTask, *, regularisation: float = 0.02, iterations: int = 200, sweeps: int = 3
) -> dict[str, Tensor]:
    """Space id -> [size, size] plan times the width, for applying to B.

    Args:
        regularisation: weight of the entropy; costs lie in [0, 2].
        sweeps: passes over the spaces; from the second on, every space sees the plans of those behind it too.
    """
    graph = task.graph
    a, b = scaled(graph, [task.a, task.b])
    logits = {s.id: torch.zeros(s.size, s.size) for s in graph.spaces}
    soft = soft_element(graph, logits, iterations)
    measured = task.correlation or {}
    for sweep in range(sweeps):
        for space in graph.spaces:
            if space.id in measured:
                if sweep:
                    continue  # what was measured depends on no other plan
                score = torch.from_numpy(np.asarray(measured[space.id])).float()
            else:
                score = _cosines(graph, space, a, b, soft)
            logits[space.id] = score / regularisation
            # children are worth what lies in them: a parent sees the weights of its members as a whole
            soft = soft_element(graph, logits, iterations, soft, space.id)
    return soft


def transported(graph: NeuronGraph, soft: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """B's state dict under a soft element."""
    return {k: apply_soft(graph, soft, k, v) if k in graph.on_tensor else v for k, v in b.items()}


def _cosines(
    graph: NeuronGraph, space: Space, a: Mapping[str, Tensor], b: Mapping[str, Tensor], soft: Mapping[str, Tensor]
) -> Tensor:
    """[size, size] cosines of the members' weights, B under the soft element on all other spaces."""
    total = torch.zeros(space.size, space.size)
    norms = torch.zeros(2, space.size)
    others = {**soft, space.id: torch.eye(space.size)}
    for axis in space.axes:
        members = torch.from_numpy(axis.members)
        x, y = (
            value.movedim(axis.axis, 0)[torch.from_numpy(axis.positions)].reshape(len(members), -1)
            for value in (a[axis.tensor], apply_soft(graph, others, axis.tensor, b[axis.tensor]))
        )
        total[members[:, None], members[None, :]] += x @ y.T
        for k, rows in enumerate((x, y)):
            norms[k, members] += rows.square().sum(1)
    scale = torch.outer(norms[0].sqrt(), norms[1].sqrt())
    return total / torch.where(scale > 0, scale, torch.ones_like(scale))


class TransportMatcher:
    """`transport`, rounded, as a matcher."""

    name = "ot"
    needs: Needs = "weights"

    def match(self, task: MatchTask) -> Element:
        return best_element(task.graph, transport(task))
