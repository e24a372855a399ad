"""Inner products of two models' weights, member by member of every space: what weight matching maximises."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Generator, Tensor

from mergeid.neuron_graph.neuron_graph import AxisMap, Element, NeuronGraph, Space

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
        for d in range(value.dim()):
            if element is not None and d != axis.axis:
                index = self.graph.gather_index(axis.tensor, d, element)
                if index is not None:
                    value = value.index_select(d, torch.from_numpy(index))
        return rows(value, axis) * self.factor[axis.tensor]

    def pair(self, axis: AxisMap, element: Mapping[str, np.ndarray]) -> tuple[Tensor, Tensor]:
        """Features of A and of B."""
        return self.features(axis, None), self.features(axis, element)

    def scores(
        self, space: Space, element: Mapping[str, np.ndarray], known: Collection[str] | None = None
    ) -> np.ndarray:
        """[size, size] float32: sum over axes of inner products; with `known` only over tensors that no other spaces
        than these lie on."""
        total = torch.zeros(space.size, space.size)
        thin: list[tuple[Tensor, Tensor]] = []
        for axis in space.axes:
            others = [s.id for s, a in self.graph.on_tensor[axis.tensor] if a.axis != axis.axis]
            if known is not None and any(s not in known for s in others):
                continue
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
        """[2, size] float64: norms of A's and B's members, which no permutation changes."""
        if space.id not in self._norms:
            squares = np.zeros((2, space.size))
            for axis in space.axes:
                for k, state in enumerate((self.a, self.b)):
                    x = rows(state[axis.tensor], axis) * self.factor[axis.tensor]
                    squares[k, axis.members] += x.square().sum(1, dtype=torch.float64).numpy()
            self._norms[space.id] = np.sqrt(squares)
        return self._norms[space.id]

    def cosines(self, space: Space, element: Mapping[str, np.ndarray]) -> np.ndarray:
        """[size, size] in [−1, 1]: the scores divided by the norms of both members."""
        return self.normalised(space, self.scores(space, element))

    def normalised(self, space: Space, scores: np.ndarray, weight: float = 1.0) -> np.ndarray:
        """Scores divided by the norms of both members, times `weight`; 0 where there is no norm."""
        norms = self.norms(space)
        inverse = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0).astype(scores.dtype)
        out = scores * (inverse[0][:, None] * np.asarray(weight, scores.dtype))
        out *= inverse[1][None, :]
        answer: np.ndarray = out
        return answer

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

    def objective(self, element: Mapping[str, np.ndarray], tensors: Collection[str] | None = None) -> float:
        """Sum over tensors (all, if not named) of ⟨A, π(B)⟩, each scaled."""
        return sum(
            self.factor[t] ** 2
            * float((x.float() * self.graph.apply(element, t, self.b[t]).float()).sum(dtype=torch.float64))
            for t, x in self.a.items()
            if tensors is None or t in tensors
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


class KeptScores:
    """Scores that follow a changing element: what has not moved since the last time is not multiplied again.

    Where few positions of a neighbouring space moved, as in late passes, ΔS = X[:, C] (Y_new − Y_old)[:, C]ᵀ over
    those positions C. Matrices are kept up to `KEPT_BYTES`.
    """

    def __init__(self, similarity: WeightSimilarity) -> None:
        self.similarity, self.graph = similarity, similarity.graph
        self.kept: dict[str, tuple[Tensor, Element]] = {}
        # chosen beforehand, so that the order in which spaces are asked for changes nothing
        sizes = np.cumsum([4 * s.size**2 for s in self.graph.spaces])
        self.keeps = {
            s.id for s, bytes_so_far in zip(self.graph.spaces, sizes, strict=True) if bytes_so_far <= KEPT_BYTES
        }

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
        if space.id in self.keeps:
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
