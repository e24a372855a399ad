"""Weight matching: Git Re-Basin's coordinate descent (Ainsworth et al. 2023, algorithm 1) on a neuron graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Generator

from mergeid.matchers.assignment import TreeAssignment, descendants, roots
from mergeid.matchers.inner_products import KeptScores, WeightSimilarity
from mergeid.matchers.layerwise import layerwise_matching
from mergeid.matchers.plain import PlainMatch, seen_plainly
from mergeid.matchers.protocol import MatchTask, Needs
from mergeid.matchers.schedule import neighbours, owners_of, shared_out, sharing, waves
from mergeid.neuron_graph.neuron_graph import Element, Space

Extra = Callable[[Space], np.ndarray]
LEAST_GAIN = 1e-6
"""Share of the largest inner product that an assignment must gain: less is rounding."""


def weight_matching(
    similarity: WeightSimilarity,
    *,
    generator: Generator,
    element: Element | None = None,
    extra: Extra | None = None,
    only: set[str] | None = None,
    max_passes: int = 50,
    cosines: float | None = None,
    workers: int | None = None,
) -> Element:
    """Coordinate descent over the trees of the graph until no assignment changes.

    A tree is solved again only where a space that shares a tensor with it has moved since. Trees that share no tensor
    are assigned side by side (`mergeid.matchers.schedule`).

    Args:
        similarity: the two models' weights.
        generator: order of the trees after the first pass.
        element: where to start (identity).
        extra: a further similarity per space, added to the weights' (activation correlations).
        only: spaces that may move (with all that lies in them); the others stay.
        cosines: use so many times the cosines instead of inner products.
        workers: threads for assignments, which change nothing but the time; default: torch's number of threads.

    Returns:
        the group element to apply to B.
    """
    graph = similarity.graph
    now: Element = dict(element or graph.identity())
    tops = roots(graph)
    if only is not None:
        tops = [s for s in graph.spaces if s.id in only and not only & set(s.parents)]
    trees = [descendants(graph, s) for s in tops]
    beside = neighbours(trees)
    apart = [near | shared for near, shared in zip(beside, sharing(trees), strict=True)]
    tensors = [{a.tensor for s in tree for a in s.axes} for tree in trees]
    kept = KeptScores(similarity)

    plain = extra is None and cosines is None

    def scores_of(k: int) -> dict[str, np.ndarray] | PlainMatch:
        if plain and (found := seen_plainly(similarity, trees[k], now)) is not None:
            return found
        return {s.id: _with_extra(similarity, s, kept.scores(s, now), extra, cosines) for s in trees[k]}

    def better(k: int, scores: dict[str, np.ndarray] | PlainMatch) -> Element:
        """What moves to gain; nothing where nothing does."""
        if isinstance(scores, PlainMatch):
            return {tops[k].id: scores.perm} if scores.gain > LEAST_GAIN * scores.size else {}
        found = TreeAssignment(graph, scores).solve(tops[k], now)
        moved = {s.id: found[s.id] for s in trees[k] if not np.array_equal(found[s.id], now[s.id])}
        if not moved or not _gains(scores, found, now):
            return {}
        if k in beside[k] and extra is None:
            gain = similarity.objective(found, tensors[k]) - similarity.objective(now, tensors[k])
            if gain <= 1e-9:
                return {}
        return moved

    stale = set(range(len(trees)))
    order = list(range(len(trees)))
    owners = owners_of(waves(order, apart), trees)
    for _ in range(max_passes):
        for wave in waves(order, apart):
            due = [k for k in wave if k in stale]
            stale -= set(due)
            for k, moved in shared_out(due, owners, scores_of, better, workers):
                if moved:
                    now = {**now, **moved}
                    stale |= beside[k]
        if not stale:
            break
        order = torch.randperm(len(trees), generator=generator).tolist()
    return now


def _with_extra(
    similarity: WeightSimilarity, space: Space, base: np.ndarray, extra: Extra | None, cosines: float | None
) -> np.ndarray:
    if cosines is not None:
        base = similarity.normalised(space, base, cosines)  # a matrix of its own
        if extra is not None:
            base += extra(space)
        return base
    return base if extra is None else base + extra(space)


def _gains(scores: Mapping[str, np.ndarray], found: Element, element: Element) -> bool:
    """Whether the found assignment is better by more than rounding."""
    gain, size = 0.0, 0.0
    for k, score in scores.items():
        i = np.arange(len(score))
        new, old = score[i, found[k]].astype(np.float64), score[i, element[k]].astype(np.float64)
        gain += float((new - old).sum())
        size = max(size, float(np.abs(new).max()), float(np.abs(old).max()))
    return gain > LEAST_GAIN * size


def good_start(similarity: WeightSimilarity) -> Element:
    """The order of a permuted copy; else the identity or layer-wise matching, whichever has the larger objective: from
    there descent is shorter, and where much has moved its end is higher (ResNet-50: 2 of 7 s, the planted element
    either way)."""
    if similarity.copied is not None:
        return similarity.copied
    starts = [similarity.graph.identity(), layerwise_matching(similarity)]
    return max(starts, key=similarity.objective)


class WeightMatcher:
    """`weight_matching` from a good start, as a matcher."""

    name = "weight"
    needs: Needs = "weights"

    def match(self, task: MatchTask) -> Element:
        similarity = WeightSimilarity(task.graph, task.a, task.b)
        return weight_matching(similarity, generator=task.generator, element=good_start(similarity))
