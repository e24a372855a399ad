"""Cycle-consistent matching of N models by activations and weights: C²M³'s universe, `combined_matching`'s measure.

As in `mergeid.matchers.cycle` every model p has one element π_p into a common order, so that the maps between models
compose to the identity around any cycle. What is maximised is the sum over all pairs of models of the correlations of
the activations that meet in a place, plus the cosines of the weights. From the star of every model (the others matched
to it) each model in turn is matched to all others at once, until none moves. Ends differ by more than the sum tells:
where the average of the models can be run, the end whose average is nearest to what the models say is taken, else that
with the largest sum.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Generator, Tensor

from mergeid.matchers.activation import WEIGHT_SHARE, combined_matching
from mergeid.matchers.inner_products import WeightSimilarity
from mergeid.matchers.soft import scaled
from mergeid.matchers.universe import relative
from mergeid.matchers.weight import weight_matching
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph, Space

Correlations = Mapping[tuple[int, int], Mapping[str, np.ndarray]]
"""(p, q) with p < q -> space id -> [size, size] Pearson correlations of model p's and model q's activations."""

SHARES = (WEIGHT_SHARE, 3 * WEIGHT_SHARE)
"""Weights of the cosines that make the ends to be judged. Five perceptrons on Fashion-MNIST, mean of five sets: 82.6 %
by the largest sum, 82.8 % judged with the first weight alone, 83.0 % with both, where the best of 24 sequences of
pairwise merges has 83.0 %. Both weights were chosen on these sets; of five others the means are 82.8 % and 82.6 %, and
the difference is 0.22 ± 0.10 points (`examples/methods`)."""


def joint_matching(
    graph: NeuronGraph,
    states: Sequence[Mapping[str, Tensor]],
    correlations: Correlations,
    *,
    generator: Generator,
    judge: Callable[[Sequence[Element]], float] | None = None,
    max_sweeps: int = 30,
) -> list[Element]:
    """One element per model into the universe, which is the first model's order.

    Args:
        states: state dicts of one architecture, at least two.
        correlations: of every pair; spaces that are missing are matched by their weights.
        judge: of the elements of all models, how far their average is from what they say (`mergeid.stages.judge`); the
            lowest is taken. None: the largest sum is.
        max_sweeps: most rounds over all models from each start.
    """
    weights = scaled(graph, states)
    best: list[Element] = []
    lowest = np.inf
    centres = range(len(states) if len(states) > 2 else 1)  # of two models both stars are the same
    shares = (WEIGHT_SHARE,) if judge is None or len(states) < 3 else SHARES
    for share, centre in itertools.product(shares, centres):
        star = [
            graph.identity()
            if q == centre
            else combined_matching(
                WeightSimilarity(graph, weights[centre], weights[q]),
                _between(correlations, centre, q),
                generator=generator,
                share=share,
            )
            for q in range(len(states))
        ]
        found = _refined(graph, weights, correlations, star, generator, max_sweeps, share)
        cost = -joint_value(graph, weights, correlations, found) if judge is None else judge(found)
        if not best or cost < lowest:
            best, lowest = found, cost
    return [relative(best, 0, q) for q in range(len(states))]


def joint_value(
    graph: NeuronGraph, states: Sequence[Mapping[str, Tensor]], correlations: Correlations, universe: Sequence[Element]
) -> float:
    """Σ_{p<q} Σ_spaces Σ_places (correlation + cosine) of what p and q have there."""
    total = 0.0
    for p, q in itertools.combinations(range(len(states)), 2):
        similarity = WeightSimilarity(graph, graph.apply_state(universe[p], states[p]), states[q])
        for s in graph.spaces:
            mine, theirs = universe[p][s.id], universe[q][s.id]
            cosines = similarity.cosines(s, universe[q])
            total += WEIGHT_SHARE * float(cosines[np.arange(s.size), theirs].sum(dtype=np.float64))
            found = correlations[p, q].get(s.id)
            if found is not None:
                total += float(found[mine, theirs].sum(dtype=np.float64))
    return total


def _between(correlations: Correlations, p: int, q: int) -> dict[str, np.ndarray]:
    """Of p's activations (rows) and q's."""
    return dict(correlations[p, q]) if p < q else {k: x.T for k, x in correlations[q, p].items()}


def _refined(
    graph: NeuronGraph,
    weights: Sequence[Mapping[str, Tensor]],
    correlations: Correlations,
    universe: Sequence[Element],
    generator: Generator,
    max_sweeps: int,
    share: float,
) -> list[Element]:
    """Each model is matched to the mean of the others until none moves."""
    universe = list(universe)
    if len(universe) < 3:
        return universe  # the star is matched already
    for _ in range(max_sweeps):
        moved = False
        for p in range(len(universe)):
            rest = [q for q in range(len(universe)) if q != p]
            others = {
                name: torch.stack([graph.apply(universe[q], name, weights[q][name]) for q in rest]).mean(0)
                for name in graph.on_tensor
            }

            def extra(space: Space, p: int = p, rest: list[int] = rest) -> np.ndarray:
                met = [
                    found[universe[q][space.id]]
                    for q in rest
                    if (found := _between(correlations, q, p).get(space.id)) is not None
                ]
                return np.mean(met, 0) if met else np.zeros((space.size, space.size), np.float32)

            found = weight_matching(
                WeightSimilarity(graph, others, weights[p]),
                generator=generator,
                element=universe[p],
                extra=extra,
                cosines=share,
                max_passes=8,
            )
            moved |= any(not np.array_equal(found[k], universe[p][k]) for k in found)
            universe[p] = found
        if not moved:
            break
    return universe
