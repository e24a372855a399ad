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

KEPT_BYTES = 1 << 30
"""Most memory for score matrices that are kept from one pass to the next."""
THIN = 64
"""Up to this many elements per member, the tensors of a space are multiplied together (biases, norms)."""


class WeightSimilarity:
    """Inner products of the weights that meet at the members of a space, B under a group element on its other axes.

    Args:
        scale: divide every tensor by its root mean square over both models, so that biases, statistics and kernels
            count by their number of elements; False: as they are (Git Re-Basin).
    """

    def __init__(
        self, graph: NeuronGraph, a: Mapping[str, Tensor], b: Mapping[str, Tensor], *, scale: bool = True
    ) -> None:
        self.graph = graph
        self.a = {name: a[name].detach() for name in graph.on_tensor}
        self.b = {name: b[name].detach() for name in graph.on_tensor}
        self.factor = {name: 1.0 for name in self.a}
        if scale:
            for name in self.a:
                square = sum(float(t[name].float().square().mean(dtype=torch.float64)) for t in (self.a, self.b)) / 2
                self.factor[name] = square**-0.5 if square > 0 else 1.0
        self._norms: dict[str, np.ndarray] = {}

    def features(self, axis: AxisMap, element: Mapping[str, np.ndarray] | None) -> Tensor:
        """[members on the axis, elements] of B under `element`, or of A for None; float32."""
        value = (self.a if element is None else self.b)[axis.tensor]
        for d in range(value.dim()) if element is not None else ():
            if d != axis.axis:
                index = self.graph.gather_index(axis.tensor, d, element)
                if index is not None:
                    value = value.index_select(d, torch.from_numpy(index))
        return rows(value, axis) * self.factor[axis.tensor]

    def pair(self, axis: AxisMap, element: Mapping[str, np.ndarray]) -> tuple[Tensor, Tensor]:
        """Features of A and of B."""
        return self.features(axis, None), self.features(axis, element)

    def scores(self, space: Space, element: Mapping[str, np.ndarray]) -> np.ndarray:
        """[size, size] float32: sum over axes of inner products."""
        total = torch.zeros(space.size, space.size)
        thin: list[tuple[Tensor, Tensor]] = []
        for axis in space.axes:
            x, y = self.pair(axis, element)
            if x.shape[1] <= THIN and len(axis.members) == space.size:
                thin.append((x, y))
            else:
                add_product(total, axis, x, y)
        if thin:
            x, y = (torch.cat(parts, 1) for parts in zip(*thin, strict=True))
            total.addmm_(x, y.T)
        return total.numpy()

    def norms(self, space: Space) -> np.ndarray:
        """[size, size] float64: product of the norms of A's and B's members, which no permutation changes."""
        if space.id not in self._norms:
            squares = np.zeros((2, space.size))
            for axis in space.axes:
                for k, state in enumerate((self.a, self.b)):
                    x = rows(state[axis.tensor], axis) * self.factor[axis.tensor]
                    squares[k, axis.members] += x.square().sum(1, dtype=torch.float64).numpy()
            self._norms[space.id] = squares
        squares = self._norms[space.id]
        return np.sqrt(squares[0][:, None] * squares[1][None, :])

    def cosines(self, space: Space, element: Mapping[str, np.ndarray]) -> np.ndarray:
        """[size, size] in [−1, 1]: the scores divided by the norms of both members."""
        return self.normalised(space, self.scores(space, element))

    def normalised(self, space: Space, scores: np.ndarray) -> np.ndarray:
        """Scores divided by the norms of both members."""
        scale = self.norms(space)
        return np.divide(scores, scale, out=np.zeros_like(scale), where=scale > 0)

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
        """Sum over tensors of ⟨A, π(B)⟩, each scaled."""
        return sum(
            self.factor[t] ** 2
            * float((x.float() * self.graph.apply(element, t, self.b[t]).float()).sum(dtype=torch.float64))
            for t, x in self.a.items()
        )


def rows(value: Tensor, axis: AxisMap) -> Tensor:
    """[members on the axis, elements] float32."""
    front = value.movedim(axis.axis, 0)
    where = axis.positions
    if where.size != len(front) or not np.array_equal(where.reshape(-1), np.arange(len(front))):
        front = front[torch.from_numpy(where)]
    return front.reshape(len(where), -1).float()


def add_product(total: Tensor, axis: AxisMap, x: Tensor, y: Tensor) -> None:
    """Add x yᵀ to the rows and columns of the axis's members, in place."""
    if len(axis.members) == len(total):
        total.addmm_(x, y.T)
    else:
        members = torch.from_numpy(axis.members)
        total[members[:, None], members[None, :]] += x @ y.T


class _Kept:
    """Scores that follow a changing element: what has not moved since the last time is not multiplied again.

    Where few positions of a neighbouring space moved, as in late passes, ΔS = X[:, C] (Y_new − Y_old)[:, C]ᵀ over
    those positions C. Matrices are kept up to `KEPT_BYTES`.
    """

    def __init__(self, similarity: WeightSimilarity) -> None:
        self.similarity, self.graph = similarity, similarity.graph
        self.kept: dict[str, tuple[Tensor, Element]] = {}
        self.left = KEPT_BYTES

    def scores(self, space: Space, element: Element) -> np.ndarray:
        """`WeightSimilarity.scores`, for reading only."""
        if space.id in self.kept:
            total, before = self.kept[space.id]
            changes = [self._changes(axis, before, element) for axis in space.axes]
            if sum(share * self._work(axis) for axis, (share, _) in zip(space.axes, changes, strict=True)) < 0.5 * sum(
                map(self._work, space.axes)
            ):
                for axis, (_, moved) in zip(space.axes, changes, strict=True):
                    if moved:
                        self._update(total, axis, moved, before, element)
                self.kept[space.id] = (total, dict(element))
                return total.numpy()
        total = torch.from_numpy(self.similarity.scores(space, element))
        if space.id in self.kept or total.nbytes <= self.left:
            self.left -= 0 if space.id in self.kept else total.nbytes
            self.kept[space.id] = (total, dict(element))
        return total.numpy()

    def _work(self, axis: AxisMap) -> int:
        return len(axis.members) * self.similarity.b[axis.tensor].numel()

    def _changes(self, axis: AxisMap, before: Element, now: Element) -> tuple[float, dict[int, np.ndarray]]:
        """Share of the products that are new, and per other dimension the positions that hold something else."""
        moved: dict[int, np.ndarray] = {}
        share = 0.0
        shape = self.graph.tensors[axis.tensor]
        for d, n in enumerate(shape):
            spaces = [s.id for s, a in self.graph.on_tensor[axis.tensor] if a.axis == d]
            if d == axis.axis or all(before[s] is now[s] for s in spaces):
                continue
            old, new = (self._index(axis.tensor, d, e) for e in (before, now))
            where = np.flatnonzero(old != new)
            if len(where):
                moved[d] = where
                share += len(where) / n
        return (share, moved) if len(moved) < 2 else (1.0, moved)

    def _index(self, tensor: str, d: int, element: Element) -> np.ndarray:
        index = self.graph.gather_index(tensor, d, element)
        return np.arange(self.graph.tensors[tensor][d]) if index is None else index

    def _update(
        self, total: Tensor, axis: AxisMap, moved: dict[int, np.ndarray], before: Element, now: Element
    ) -> None:
        x: Tensor = self.similarity.a[axis.tensor]
        old = new = self.similarity.b[axis.tensor]
        # one dimension alone changed: only its positions count; of several all do
        only = next(iter(moved)) if len(moved) == 1 else None
        for d in range(x.dim()):
            if d == axis.axis:
                continue
            was, is_now = (self._index(axis.tensor, d, e) for e in (before, now))
            if d == only:
                x = x.index_select(d, torch.from_numpy(moved[d]))
                was, is_now = was[moved[d]], is_now[moved[d]]
            old = old.index_select(d, torch.from_numpy(was))
            new = new.index_select(d, torch.from_numpy(is_now))
        difference = rows(new, axis) - rows(old, axis)
        add_product(total, axis, rows(x, axis) * self.similarity.factor[axis.tensor] ** 2, difference)


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

    A tree is solved again only where a space that shares a tensor with it has moved since.

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
    tops = roots(graph)
    if only is not None:
        tops = [s for s in graph.spaces if s.id in only and not only & set(s.parents)]
    trees = [descendants(graph, s) for s in tops]
    beside = _neighbours(trees)
    kept = _Kept(similarity)
    stale = set(range(len(trees)))
    order = list(range(len(trees)))
    for _ in range(max_passes):
        for k in order:
            if k not in stale:
                continue
            stale.discard(k)
            tree = trees[k]
            scores = {}
            for s in tree:
                base = kept.scores(s, element)
                if cosine:
                    base = similarity.normalised(s, base) * weight
                scores[s.id] = base + extra(s) if extra else base
            found = TreeAssignment(graph, scores).solve(tops[k], element)
            moved = [s for s in tree if not np.array_equal(found[s.id], element[s.id])]
            if not moved or not _gains(scores, found, element):
                continue
            if k in beside[k] and extra is None and similarity.objective(found) - similarity.objective(element) <= 1e-9:
                continue
            element = {**element, **{s.id: found[s.id] for s in moved}}
            stale |= beside[k]
        if not stale:
            break
        order = torch.randperm(len(trees), generator=generator).tolist()
    return element


def _neighbours(trees: list[list[Space]]) -> list[set[int]]:
    """Per tree the trees that see it move: those on another axis of one of its tensors. A tree that is its own
    neighbour (a residual block without inner width) is not granted to gain by an assignment."""
    on: dict[str, set[tuple[int, int]]] = {}
    for k, tree in enumerate(trees):
        for axis in (a for s in tree for a in s.axes):
            on.setdefault(axis.tensor, set()).add((k, axis.axis))
    beside: list[set[int]] = [set() for _ in trees]
    for places in on.values():
        for k, d in places:
            beside[k] |= {other for other, e in places if e != d}
    return beside


def _gains(scores: Mapping[str, np.ndarray], found: Element, element: Element) -> bool:
    """Whether the found assignment is better by more than rounding."""
    gain, size = 0.0, 0.0
    for k, score in scores.items():
        i = np.arange(len(score))
        new, old = score[i, found[k]].astype(np.float64), score[i, element[k]].astype(np.float64)
        gain += float((new - old).sum())
        size = max(size, float(np.abs(new).max()), float(np.abs(old).max()))
    return gain > 1e-6 * size


class WeightMatcher:
    """`weight_matching` as a matcher."""

    name = "weight"
    needs: Needs = "weights"

    def match(self, task: MatchTask) -> Element:
        return weight_matching(WeightSimilarity(task.graph, task.a, task.b), generator=task.generator)
