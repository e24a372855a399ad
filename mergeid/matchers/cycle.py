"""Cycle-consistent matching of N models (Crisostomi et al. 2024, "C²M³: Cycle-Consistent Multi-Model Merging").

Each model p has one element π_p into a common order, the universe, and the map from q to p is π_p⁻¹ π_q: around any
cycle these compose to the identity by construction. The elements maximise Σ_{p<q} Σ_tensors ⟨π_p W_p, π_q W_q⟩ by
Frank-Wolfe over doubly stochastic matrices, all spaces and models at once: the linear problem of a step is one
assignment per tree of spaces, and along the step the objective is a polynomial, whose maximum is taken exactly. The
result is rounded to the group and refined by coordinate ascent on the same objective, one model against the sum of the
others. Where weight matching to the first model already comes within 2 % of what any order could reach, nothing more is
searched. Memory: a few copies of all models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.polynomial import Chebyshev
from torch import Generator, Tensor

from mergeid.matchers.assignment import best_element
from mergeid.matchers.inner_products import WeightSimilarity
from mergeid.matchers.joint import Correlations, joint_matching
from mergeid.matchers.protocol import MatchTask, Needs
from mergeid.matchers.soft import apply_soft, hard, scaled
from mergeid.matchers.universe import relative
from mergeid.matchers.weight import good_start, weight_matching
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph

Softs = list[dict[str, Tensor]]
NEAR = 0.02
"""Share of its bound that the objective may miss without a search for more: fine-tunes of one base."""


def joint_objective(graph: NeuronGraph, states: Sequence[Mapping[str, Tensor]], universe: Sequence[Element]) -> float:
    """Σ_{p<q} Σ_tensors ⟨π_p W_p, π_q W_q⟩, tensors scaled to root mean square 1 over all models."""
    return _objective(graph, scaled(graph, states), universe)


def cycle_matching(
    graph: NeuronGraph,
    states: Sequence[Mapping[str, Tensor]],
    *,
    generator: Generator,
    max_steps: int = 50,
    tolerance: float = 1e-6,
) -> list[Element]:
    """One element per model into the universe, which is the first model's order.

    Args:
        states: state dicts of one architecture, at least two.
        max_steps: most Frank-Wolfe steps from each start (the identity, and weight matching to the first model).
        tolerance: a step that gains less than this share of the objective is the last. (With 1e-4 perceptrons end as
            high, but two ResNets end where weight matching does, at 54.7 % instead of 59.2 %.)
    """
    weights = scaled(graph, states)
    star = [graph.identity()]
    for state in weights[1:]:
        pair = WeightSimilarity(graph, weights[0], state)
        star.append(weight_matching(pair, generator=generator, element=good_start(pair)))
    best, value = star, _objective(graph, weights, star)
    if value >= (1 - NEAR) * _bound(graph, weights):
        return best
    for start in ([graph.identity() for _ in states], star):
        found = _refined(graph, weights, _frank_wolfe(graph, weights, start, max_steps, tolerance), generator)
        reached = _objective(graph, weights, found)
        if reached > value:
            best, value = found, reached
    return [relative(best, 0, q) for q in range(len(states))]


def _objective(graph: NeuronGraph, weights: list[dict[str, Tensor]], universe: Sequence[Element]) -> float:
    total = 0.0
    for name in graph.on_tensor:
        moved = [graph.apply(e, name, w[name]).double() for e, w in zip(universe, weights, strict=True)]
        total += _pairs(moved)
    return total


def _bound(graph: NeuronGraph, weights: list[dict[str, Tensor]]) -> float:
    """What the objective cannot exceed (Cauchy and Schwarz, tensor by tensor): permutations keep norms."""
    total = 0.0
    for name in graph.on_tensor:
        norms = torch.stack([w[name].double().norm() for w in weights])
        total += 0.5 * float(norms.sum().square() - norms.square().sum())
    return total


def _pairs(moved: list[Tensor]) -> float:
    """Sum of the inner products of all pairs."""
    return 0.5 * float(torch.stack(moved).sum(0).square().sum() - sum(m.square().sum() for m in moved))


def _on_the_way(
    graph: NeuronGraph, weights: list[dict[str, Tensor]], soft: Softs, vertex: Softs, degree: int
) -> Chebyshev:
    """The objective on the line from one point to the other, a polynomial of that degree."""

    def values(points: np.ndarray) -> np.ndarray:
        return np.array([_soft_objective(graph, weights, soft, vertex, t) for t in points])

    answer: Chebyshev = Chebyshev.interpolate(values, degree, domain=[0, 1])
    return answer


def _frank_wolfe(
    graph: NeuronGraph, weights: list[dict[str, Tensor]], start: Sequence[Element], steps: int, tolerance: float
) -> list[Element]:
    soft: Softs = [hard(e) for e in start]
    degree = 2 * max((len({a.axis for _, a in maps}) for maps in graph.on_tensor.values()), default=1)
    for _ in range(steps):
        slopes = _gradients(graph, weights, soft)
        vertex = [hard(best_element(graph, slope)) for slope in slopes]
        line = _on_the_way(graph, weights, soft, vertex, degree)
        stationary = line.deriv().roots()
        inside = [float(r.real) for r in stationary if abs(r.imag) < 1e-9 and 0 < r.real < 1]
        step = max([0.0, 1.0, *inside], key=line)
        if line(step) - line(0.0) <= tolerance * abs(line(0.0)):
            break
        soft = [_between(x, y, step) for x, y in zip(soft, vertex, strict=True)]
    return [best_element(graph, s) for s in soft]


def _gradients(graph: NeuronGraph, weights: list[dict[str, Tensor]], soft: Softs) -> Softs:
    leaves = [{k: m.clone().requires_grad_() for k, m in s.items()} for s in soft]
    for name in graph.on_tensor:
        moved = [apply_soft(graph, s, name, w[name]) for s, w in zip(leaves, weights, strict=True)]
        total = sum(m.detach() for m in moved)
        # the derivative of ½(‖Σ m‖² − Σ ‖m‖²), tensor by tensor so that no more than one lies in memory
        torch.autograd.backward(moved, [total - m.detach() for m in moved])
    return [{k: m.grad if m.grad is not None else torch.zeros_like(m) for k, m in s.items()} for s in leaves]


def _soft_objective(
    graph: NeuronGraph, weights: list[dict[str, Tensor]], soft: Softs, vertex: Softs, step: float
) -> float:
    here = [_between(x, y, step) for x, y in zip(soft, vertex, strict=True)]
    return sum(
        _pairs([apply_soft(graph, s, name, w[name]).double() for s, w in zip(here, weights, strict=True)])
        for name in graph.on_tensor
    )


def _between(x: Mapping[str, Tensor], y: Mapping[str, Tensor], step: float) -> dict[str, Tensor]:
    return {k: (1 - step) * m + step * y[k] for k, m in x.items()}


def _refined(
    graph: NeuronGraph, weights: list[dict[str, Tensor]], universe: list[Element], generator: Generator
) -> list[Element]:
    """Coordinate ascent: each model is matched to the sum of the others, until nothing gains."""
    universe = list(universe)
    value = _objective(graph, weights, universe)
    for _ in range(10):
        for p in range(len(universe)):
            others = {
                name: torch.stack(
                    [graph.apply(universe[q], name, w[name]) for q, w in enumerate(weights) if q != p]
                ).sum(0)
                for name in graph.on_tensor
            }
            similarity = WeightSimilarity(graph, others, weights[p])
            universe[p] = weight_matching(similarity, generator=generator, element=universe[p])
        reached = _objective(graph, weights, universe)
        if reached <= value + 1e-9 * abs(value):
            break
        value = reached
    return universe


class CycleMatcher:
    """Two models or more in one common order: by activations and weights (`joint_matching`) where there are data, else
    by the weights (`cycle_matching`)."""

    name = "cycle"
    needs: Needs = "weights"

    def match(self, task: MatchTask) -> Element:
        correlations = None if task.correlation is None else {(0, 1): task.correlation}
        return self.match_all(task.graph, [task.a, task.b], task.generator, correlations)[1]

    def match_all(
        self,
        graph: NeuronGraph,
        states: Sequence[Mapping[str, Tensor]],
        generator: Generator,
        correlations: Correlations | None = None,
        judge: Callable[[Sequence[Element]], float] | None = None,
    ) -> list[Element]:
        if correlations is None:
            return cycle_matching(graph, states, generator=generator)
        return joint_matching(graph, states, correlations, generator=generator, judge=judge)
