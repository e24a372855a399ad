"""Inner products of two models' weights, member by member of every space: what weight matching maximises."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch import Generator, Tensor

from mergeid.matchers.copies import copy_order
from mergeid.neuron_graph.neuron_graph import AxisMap, Element, NeuronGraph, Space

KEPT_BYTES = 1 << 28
"""Most memory for score matrices that are kept from one pass to the next."""
THIN = 64
"""Up to this many elements per member, the tensors of a space are multiplied together (biases, norms)."""
PIECE = 1 << 22
"""Numbers of a tensor that are brought into float32, and into B's order, at once."""


class WeightSimilarity:
    """Inner products of the weights that meet at the members of a space, B under a group element on its other axes.

    Weights stay in their own number formats, and where they lie (`mergeid.basics.on_demand`): beside the matrices that
    are asked for, a few pieces of one tensor are held. Products are added up in float32, piece by piece: of d elements
    the error is that of a sum of d terms, below 1e-7 √d of the product of the norms.

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
        self.device = next((t.device for t in self.a.values()), torch.device("cpu"))
        self.factor = {name: 1.0 for name in self.a}
        if scale:
            for name, x in self.a.items():
                square = 0.0
                for parts in self._pieces(name, {}, 0):
                    square += sum(float(t.float().square().sum(dtype=torch.float64)) for t in parts[:2])
                self.factor[name] = (square / (2 * x.numel())) ** -0.5 if square > 0 else 1.0
        self._norms: dict[str, np.ndarray] = {}

    @cached_property
    def copied(self) -> Element | None:
        """The order in which B is A, where B is a permuted copy (`copy_order`)."""
        return copy_order(self.graph, self.a, self.b)

    def _pieces(
        self, name: str, order: Mapping[int, np.ndarray | None], along: int | None
    ) -> Iterator[tuple[Tensor, Tensor, range]]:
        """A tensor of A and of B in B's order, as they lie, some positions of a dimension at a time; and which.

        Args:
            order: dimension -> old position for every new one of B; None or missing: as it is.
            along: dimension to cut; None: the whole at once."""
        shape = self.graph.tensors[name]
        if along is None or not shape:
            parts = [range(prod(shape))]
        else:
            step = max(PIECE * shape[along] // max(prod(shape), 1), 1)
            parts = [range(i, min(i + step, shape[along])) for i in range(0, shape[along], step)]
        for at in parts:
            x, y = self.a[name], self.b[name]
            first = None if along is None else order.get(along)
            if len(parts) > 1:
                assert along is not None
                x = x.narrow(along, at.start, len(at))
                if first is None:
                    y = y.narrow(along, at.start, len(at))
                else:
                    y = y.index_select(along, torch.from_numpy(first[at.start : at.stop]).to(y.device))
            for d, index in order.items():
                if index is not None and (d != along or len(parts) == 1):
                    y = y.index_select(d, torch.from_numpy(index).to(y.device))
            yield x, y, at

    def pairs(self, axis: AxisMap, element: Mapping[str, np.ndarray]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Features of A, and of B under `element`, float32 [members on the axis, elements], some elements at a time;
        and which these are, as places in the other dimensions. They are not scaled."""
        shape = self.graph.tensors[axis.tensor]
        rest = [d for d in range(len(shape)) if d != axis.axis]
        order = {d: self.graph.gather_index(axis.tensor, d, element) for d in rest}
        along = max(rest, key=lambda d: shape[d], default=None)
        places = torch.arange(prod(shape[d] for d in rest)).reshape([shape[d] for d in rest])
        for x, y, at in self._pieces(axis.tensor, order, along):
            here = places if along is None else places.narrow(rest.index(along), at.start, len(at))
            yield rows(x, axis), rows(y, axis), here.reshape(-1).repeat(axis.positions.shape[1])

    def axes(self, space: Space, known: Collection[str] | None = None) -> list[AxisMap]:
        """The space's axes; with `known` only those of tensors that no other spaces than these lie on."""
        on = self.graph.on_tensor
        return [
            axis
            for axis in space.axes
            if known is None or all(s.id in known for s, a in on[axis.tensor] if a.axis != axis.axis)
        ]

    def scores(
        self, space: Space, element: Mapping[str, np.ndarray], known: Collection[str] | None = None
    ) -> np.ndarray:
        """[size, size] float32: sum over axes of inner products; with `known` only over tensors that no other spaces
        than these lie on."""
        return self.products(space, element, known).cpu().numpy()

    def products(self, space: Space, element: Mapping[str, np.ndarray], known: Collection[str] | None = None) -> Tensor:
        """`scores`, where the weights are."""
        total = torch.zeros(space.size, space.size, device=self.device)
        thin: list[tuple[Tensor, Tensor]] = []
        for axis in self.axes(space, known):
            factor, whole = self.factor[axis.tensor], prod(self.graph.tensors[axis.tensor])
            few = len(axis.members) == space.size and whole <= THIN * space.size
            for x, y, _ in self.pairs(axis, element):
                if few:
                    thin.append((x * factor, y * factor))
                else:
                    add_product(total, axis, x, y, factor**2)
        if thin:
            x, y = (torch.cat(parts, 1) for parts in zip(*thin, strict=True))
            total.addmm_(x, y.T)
        return total

    def paired(self, axes: Sequence[AxisMap], perm: np.ndarray, element: Mapping[str, np.ndarray]) -> Tensor:
        """Inner products of A's members of a space with B's that `perm` puts in their places, float64 [size]."""
        total = torch.zeros(len(perm), dtype=torch.float64, device=self.device)
        for axis in axes:
            mine = torch.from_numpy(axis.members).to(self.device)
            theirs = torch.from_numpy(np.searchsorted(axis.members, perm[axis.members])).to(self.device)
            stays = bool((theirs == torch.arange(len(theirs), device=self.device)).all())
            for x, y, _ in self.pairs(axis, element):
                total[mine] += (x * (y if stays else y[theirs])).sum(1, dtype=torch.float64) * (
                    self.factor[axis.tensor] ** 2
                )
        return total

    def norms(self, space: Space) -> np.ndarray:
        """[2, size] float64: norms of A's and B's members, which no permutation changes."""
        if space.id not in self._norms:
            squares = np.zeros((2, space.size))
            for axis in space.axes:
                shape = self.graph.tensors[axis.tensor]
                along = max((d for d in range(len(shape)) if d != axis.axis), key=lambda d: shape[d], default=None)
                for parts in self._pieces(axis.tensor, {}, along):
                    for k, x in enumerate(parts[:2]):
                        found = rows(x, axis).square().sum(1, dtype=torch.float64) * self.factor[axis.tensor] ** 2
                        squares[k, axis.members] += found.cpu().numpy()
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

    def half(self, space: Space, element: Mapping[str, np.ndarray], generator: Generator) -> np.ndarray:
        """[size, size] float32: the scores from a random half of the weights, to fit a match; what is left of all
        scores can judge it."""
        total = torch.zeros(space.size, space.size, device=self.device)
        for axis in space.axes:
            shape = self.graph.tensors[axis.tensor]
            chosen = torch.rand(prod(shape) // shape[axis.axis], generator=generator) < 0.5
            for x, y, places in self.pairs(axis, element):
                kept = chosen[places].to(x.device)
                add_product(total, axis, x[:, kept], y[:, kept], self.factor[axis.tensor] ** 2)
        return total.cpu().numpy()

    def objective(self, element: Mapping[str, np.ndarray], tensors: Collection[str] | None = None) -> float:
        """Sum over tensors (all, if not named) of ⟨A, π(B)⟩, each scaled."""
        total = 0.0
        for name, x in self.a.items():
            if tensors is None or name in tensors:
                order = {d: self.graph.gather_index(name, d, element) for d in range(x.dim())}
                for mine, its, _ in self._pieces(name, order, 0):
                    total += self.factor[name] ** 2 * float((mine.float() * its.float()).sum(dtype=torch.float64))
        return total


def rows(value: Tensor, axis: AxisMap) -> Tensor:
    """[members on the axis, elements] float32."""
    front = value.movedim(axis.axis, 0)
    where = axis.positions
    if where.size != len(front) or not np.array_equal(where.reshape(-1), np.arange(len(front))):
        front = front[torch.from_numpy(where).to(front.device)]
    return front.reshape(len(where), -1).float()


def add_product(total: Tensor, axis: AxisMap, x: Tensor, y: Tensor, scale: float = 1.0) -> None:
    """Add scale · x yᵀ to the rows and columns of the axis's members, in place."""
    if len(axis.members) == len(total):
        total.addmm_(x, y.T, alpha=scale)
    else:
        members = torch.from_numpy(axis.members).to(total.device)
        total[members[:, None], members[None, :]] += scale * (x @ y.T)


class KeptScores:
    """Scores that follow a changing element: what has not moved since the last time is not multiplied again.

    Where few positions of a neighbouring space moved, as in late passes, ΔS = X[:, C] (Y_new − Y_old)[:, C]ᵀ over
    those positions C. Matrices are kept up to `KEPT_BYTES`.
    """

    def __init__(self, similarity: WeightSimilarity) -> None:
        self.similarity, self.graph = similarity, similarity.graph
        self.kept: dict[str, tuple[Tensor, Element]] = {}
        # chosen beforehand, so that the order in which spaces are asked for changes nothing: those that save most
        saved = {s.id: sum(map(self._work, s.axes)) / max(s.size, 1) ** 2 for s in self.graph.spaces}
        dear = sorted(self.graph.spaces, key=lambda s: -saved[s.id])
        sizes = np.cumsum([4 * s.size**2 for s in dear])
        self.keeps = {s.id for s, bytes_so_far in zip(dear, sizes, strict=True) if bytes_so_far <= KEPT_BYTES}

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
                return total.cpu().numpy()
        total = self.similarity.products(space, element)
        if space.id in self.keeps:
            self.kept[space.id] = (total, dict(element))
        return total.cpu().numpy()

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
        name, scale = axis.tensor, self.similarity.factor[axis.tensor] ** 2
        if len(moved) > 1:
            both = (self.similarity.pairs(axis, e) for e in (before, now))
            for (x, old, _), (_, new, _) in zip(*both, strict=True):
                add_product(total, axis, x, new - old, scale)
            return
        # one dimension alone changed: only its positions count
        ((only, where),) = moved.items()
        a, b = self.similarity.a[name], self.similarity.b[name]
        orders = [{d: self._index(name, d, e) for d in range(a.dim()) if d != axis.axis} for e in (before, now)]
        step = max(PIECE * a.shape[only] // a.numel(), 1)
        for at in np.split(where, range(step, len(where), step)):
            x = a.index_select(only, torch.from_numpy(at).to(a.device))
            old, new = (_picked(b, {**order, only: order[only][at]}) for order in orders)
            add_product(total, axis, rows(x, axis), rows(new, axis) - rows(old, axis), scale)


def _picked(value: Tensor, index: Mapping[int, np.ndarray]) -> Tensor:
    """Positions of several dimensions."""
    for d in sorted(index, key=lambda d: len(index[d]) / value.shape[d]):
        value = value.index_select(d, torch.from_numpy(index[d]).to(value.device))
    return value
