"""Weight matching: Git Re-Basin's coordinate descent (Ainsworth et al. 2023, algorithm 1) on a neuron graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Generator, Tensor

from mergeid.graph.neuron_graph import AxisMap, Element, NeuronGraph, Space
from mergeid.match.assignment import TreeAssignment, descendants, roots
from mergeid.match.protocol import MatchTask, Needs

Extra = Callable[[Space], np.ndarray]


class WeightSimilarity:
    """Inner products of the weights that meet at the members of a space, B under a group element on its other axes.

    Every tensor is divided by its root mean square over both models, so that biases, statistics and kernels count
    by their number of elements.
    """

    def __init__(self, graph: NeuronGraph, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
        self.graph = graph
        self.a: dict[str, Tensor] = {}
        self.b: dict[str, Tensor] = {}
        for name in graph.on_tensor:
            x, y = a[name].float(), b[name].float()
            scale = torch.sqrt((x.square().mean(dtype=torch.float64) + y.square().mean(dtype=torch.float64)) / 2)
            scale = scale.float() if scale > 0 else torch.ones(())
            self.a[name], self.b[name] = x / scale, y / scale

    def pair(self, axis: AxisMap, element: Mapping[str, np.ndarray]) -> tuple[Tensor, Tensor]:
        """Features [members on the axis, elements] of A and of B."""
        x, y = self.a[axis.tensor], self.b[axis.tensor]
        for d in range(y.dim()):
            if d != axis.axis:
                index = self.graph.gather_index(axis.tensor, d, element)
                if index is not None:
                    y = y.index_select(d, torch.from_numpy(index))
        where = torch.from_numpy(axis.positions)
        n = len(where)
        return tuple(t.movedim(axis.axis, 0)[where].reshape(n, -1) for t in (x, y))  # type: ignore[return-value]

    def scores(self, space: Space, element: Mapping[str, np.ndarray]) -> np.ndarray:
        """[size, size] float64: sum over axes of inner products."""
        total = np.zeros((space.size, space.size))
        for axis in space.axes:
            x, y = self.pair(axis, element)
            total[np.ix_(axis.members, axis.members)] += (x @ y.T).double().numpy()
        return total

    def cosines(self, space: Space, element: Mapping[str, np.ndarray]) -> np.ndarray:
        """[size, size] in [−1, 1]: the scores divided by the norms of both members."""
        norms = np.zeros((2, space.size))
        for axis in space.axes:
            for k, t in enumerate(self.pair(axis, element)):
                norms[k, axis.members] += t.square().sum(1, dtype=torch.float64).numpy()
        scale = np.sqrt(norms[0][:, None] * norms[1][None, :])
        return np.divide(self.scores(space, element), scale, out=np.zeros_like(scale), where=scale > 0)

    def halves(
        self, space: Space, element: Mapping[str, np.ndarray], generator: Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Two score matrices from disjoint random halves of the weights: one to fit a match, one to judge it."""
        both = np.zeros((2, space.size, space.size))
        for axis in space.axes:
            x, y = self.pair(axis, element)
            first = torch.rand(x.shape[1], generator=generator) < 0.5
            for k, chosen in enumerate((first, ~first)):
                both[k][np.ix_(axis.members, axis.members)] += (x[:, chosen] @ y[:, chosen].T).double().numpy()
        return both[0], both[1]

    def objective(self, element: Mapping[str, np.ndarray]) -> float:
        """Sum over tensors of ⟨A, π(B)⟩."""
        return sum(
            float((self.a[t] * self.graph.apply(element, t, self.b[t])).sum(dtype=torch.float64)) for t in self.a
        )


def weight_matching(
    similarity: WeightSimilarity,
    *,
    generator: Generator,
    element: Element | None = None,
    extra: Extra | None = None,
    only: set[str] | None = None,
    max_passes: int = 50,
    cosine: bool = False,
    weight: float = 1.0,
) -> Element:
    """Coordinate descent over the trees of the graph until no assignment changes.

    Args:
        similarity: the two models' weights.
        generator: order of the trees after the first pass.
        element: where to start (identity).
        extra: a further similarity per space, added to the weights' (activation correlations).
        only: spaces that may move (with all that lies in them); the others stay.
        cosine, weight: use `weight` · cosines instead of inner products.

    Returns:
        the group element to apply to B.
    """
    graph = similarity.graph
    element = dict(element or graph.identity())
    trees = roots(graph)
    if only is not None:
        trees = [s for s in graph.spaces if s.id in only and not only & set(s.parents)]
    order = list(range(len(trees)))
    for _ in range(max_passes):
        changed = False
        for k in order:
            tree = descendants(graph, trees[k])
            scores = {}
            for s in tree:
                base = similarity.cosines(s, element) * weight if cosine else similarity.scores(s, element)
                scores[s.id] = base + extra(s) if extra else base
            found = TreeAssignment(graph, scores).solve(trees[k], element)
            if any(not np.array_equal(found[s.id], element[s.id]) for s in tree):
                if _coupled(tree) and not _better(scores, similarity, found, element, extra):
                    continue
                element, changed = found, True
        if not changed:
            break
        order = torch.randperm(len(trees), generator=generator).tolist()
    return element


def _coupled(tree: list[Space]) -> bool:
    """Whether one tensor has two axes in the tree (a residual block without inner width): descent is not granted."""
    seen: set[str] = set()
    for s in tree:
        for a in s.axes:
            key = a.tensor
            if key in seen and any(b.tensor == key and b.axis != a.axis for t in tree for b in t.axes):
                return True
            seen.add(key)
    return False


def _better(
    scores: Mapping[str, np.ndarray],
    similarity: WeightSimilarity,
    found: Element,
    element: Element,
    extra: Extra | None,
) -> bool:
    gain = similarity.objective(found) - similarity.objective(element)
    if extra is None:
        return gain > 1e-9
    value = 0.0
    for s, score in scores.items():
        rows = np.arange(len(score))
        value += float((score[rows, found[s]] - score[rows, element[s]]).sum())
    return value > 1e-9


class WeightMatcher:
    """`weight_matching` as a matcher."""

    name = "weight"
    needs: Needs = "weights"

    def match(self, task: MatchTask) -> Element:
        return weight_matching(WeightSimilarity(task.graph, task.a, task.b), generator=task.generator)
