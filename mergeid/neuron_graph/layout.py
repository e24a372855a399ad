"""How the positions of a tensor are laid out over neuron labels.

Every dimension of a tensor is a list of *fine* dimensions (row-major, outer first; empty for size 1, and for size 0,
so that a layer that got no rows still tells what its weights belong to). A fine
dimension is *frozen* (batch, tokens, space: no permutation is wanted there), *free* (the values do not vary along
it, it constrains nothing) or *labelled*. Labelled fine dimensions come in groups; a group carries one integer array
of their shape. ``[B, T, C]`` has the group {C}; after ``view(B, T, 3, H, D)`` the group {3, H, D} has the same labels
reshaped. Views, permutations, slices and concatenations therefore only move label arrays around.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from mergeid.neuron_graph.facts import Facts, Labels

FROZEN, FREE, LABELLED = "frozen", "free", "labelled"


class Fine:
    """One fine dimension; identity matters, so two tensors never share one by accident of size."""

    __slots__ = ("kind", "size")

    def __init__(self, size: int, kind: str) -> None:
        self.size, self.kind = size, kind

    def __repr__(self) -> str:
        return f"{self.kind[:3]}{self.size}"


@dataclass(frozen=True, eq=False)
class Group:
    """Labels over several fine dimensions at once, axis k of `labels` belonging to ``fines[k]``."""

    labels: Labels
    fines: tuple[Fine, ...]

    def ordered(self, fines: Sequence[Fine]) -> Labels:
        """The labels with their axes in the order of `fines` (a permutation of ``self.fines``)."""
        answer: Labels = self.labels.transpose([self.fines.index(f) for f in fines])
        return answer


@dataclass(frozen=True, eq=False)
class Layout:
    """Label layout of one tensor.

    Attributes:
        dims: fine dimensions of every dimension.
        groups: disjoint groups that cover all labelled fine dimensions.
        data: whether the tensor's values depend on the model's inputs.
    """

    dims: tuple[tuple[Fine, ...], ...]
    groups: tuple[Group, ...] = ()
    data: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(prod(f.size for f in d) for d in self.dims)

    def group_of(self, fine: Fine) -> Group:
        return next(g for g in self.groups if fine in g.fines)

    def with_dims(self, dims: Iterable[tuple[Fine, ...]]) -> Layout:
        """Same fine dimensions in another arrangement; all labelled ones must stay."""
        return Layout(tuple(dims), self.groups, self.data)

    def labels_on(self, dims: Iterable[int]) -> Labels:
        """All labels of groups that touch the given dimensions, flat."""
        fines = {f for d in dims for f in self.dims[d] if f.kind == LABELLED}
        parts = [g.labels.reshape(-1) for g in self.groups if fines & set(g.fines)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    @property
    def all_labels(self) -> Labels:
        return self.labels_on(range(len(self.dims)))


def uniform(shape: Sequence[int], kind: str, data: bool = False) -> Layout:
    """A layout without labels: every dimension larger than 1 is `kind`."""
    return Layout(tuple((Fine(n, kind),) if n > 1 else () for n in shape), (), data)


def of_axes(labels: Sequence[Labels | None], shape: Sequence[int]) -> Layout:
    """One group per dimension (the layout of a parameter); None for a frozen dimension."""
    dims: list[tuple[Fine, ...]] = []
    groups: list[Group] = []
    for n, lab in zip(shape, labels, strict=True):
        if n <= 1:
            dims.append(())
        elif lab is None:
            dims.append((Fine(n, FROZEN),))
        else:
            fine = Fine(n, LABELLED)
            dims.append((fine,))
            groups.append(Group(lab, (fine,)))
    return Layout(tuple(dims), tuple(groups))


def replace_fine(layout: Layout, old: Fine, new: Sequence[Fine], labels: Labels | None = None) -> Layout:
    """Put `new` fine dimensions in the place of one; `labels` is the group's array in the new arrangement."""
    dims = tuple(tuple(g for f in d for g in (new if f is old else (f,))) if old in d else d for d in layout.dims)
    groups = layout.groups
    if old.kind == LABELLED:
        assert labels is not None
        replaced = []
        for g in groups:
            if old in g.fines:
                fines = tuple(x for f in g.fines for x in (new if f is old else (f,)))
                g = Group(labels, fines)
            replaced.append(g)
        groups = tuple(replaced)
    return Layout(dims, groups, layout.data)


def split(layout: Layout, fine: Fine, sizes: Sequence[int]) -> Layout:
    """Split one fine dimension row-major into `sizes` (their product is its size; ones are dropped)."""
    sizes = [s for s in sizes if s != 1]
    if len(sizes) == 1:
        return layout
    new = tuple(Fine(s, fine.kind) for s in sizes)
    labels = None
    if fine.kind == LABELLED:
        group = layout.group_of(fine)
        k = group.fines.index(fine)
        shape = group.labels.shape
        labels = group.labels.reshape(*shape[:k], *sizes, *shape[k + 1 :])
    return replace_fine(layout, fine, new, labels)


def merge(facts: Facts, layout: Layout, run: Sequence[Fine], why: str) -> tuple[Layout, Fine]:
    """Merge consecutive fine dimensions of one or several adjacent dimensions into one.

    Fine dimensions of one group merge by a reshape of the labels. A mixture gets fresh labels for every
    combination, each of them lying in its parts.
    """
    if len(run) == 1:
        return layout, run[0]
    kinds = {f.kind for f in run}
    size = prod(f.size for f in run)
    involved = [g for g in layout.groups if set(g.fines) & set(run)]
    rest: list[Fine] = []
    labels: Labels | None = None
    if kinds == {FREE}:
        fine = Fine(size, FREE)
    elif LABELLED not in kinds:
        fine = Fine(size, FROZEN)
    else:
        fine = Fine(size, LABELLED)
        rest = [f for g in involved for f in g.fines if f not in run]
        if kinds == {LABELLED} and len(involved) == 1:
            labels = involved[0].ordered([*run, *rest])
        else:
            order = [*run, *rest]
            labels = facts.fresh([f.size for f in order])
            for g in involved:
                inside = [f for f in order if f in g.fines]
                shape = [f.size if f in g.fines else 1 for f in order]
                facts.par(labels, g.ordered(inside).reshape(shape))
            frozen = [f for f in run if f.kind == FROZEN]
            if frozen:
                shape = [f.size if f in frozen else 1 for f in order]
                facts.par(labels, facts.frozen([f.size for f in frozen], why).reshape(shape))
        labels = labels.reshape(size, *(f.size for f in rest))
    first = run[0]
    dims = tuple(tuple(fine if f is first else f for f in d if f is first or f not in run) for d in layout.dims)
    groups = [g for g in layout.groups if g not in involved]
    if labels is not None:
        groups.append(Group(labels, (fine, *rest)))
    return Layout(dims, tuple(groups), layout.data), fine


def merged_dim(facts: Facts, layout: Layout, dim: int, why: str) -> Layout:
    """The layout with dimension `dim` as at most one fine dimension."""
    if len(layout.dims[dim]) > 1:
        layout, _ = merge(facts, layout, layout.dims[dim], why)
    return layout


def view(facts: Facts, layout: Layout, shape: Sequence[int], why: str) -> Layout:
    """Row-major reshape. Fine dimensions are split or regrouped lazily; only an incompatible split merges."""
    while True:
        fines = [f for d in layout.dims for f in d]
        dims: list[tuple[Fine, ...]] = []
        action: Callable[[Layout], Layout] | None = None
        i = 0
        for n, want in enumerate(shape):
            taken: list[Fine] = []
            need = want
            while need > 1 and action is None:
                f = fines[i]
                if need % f.size == 0:
                    taken.append(f)
                    need //= f.size
                    i += 1
                elif f.size % need == 0:
                    parts = [need, f.size // need]
                    action = _splitter(f, parts)
                else:
                    run = _incompatible_run(fines, i - len(taken), shape, n)
                    action = _merger(facts, run, why)
            if action is not None:
                break
            dims.append(tuple(taken))
        if action is None:
            return layout.with_dims(dims)
        layout = action(layout)


def _splitter(fine: Fine, sizes: Sequence[int]) -> Callable[[Layout], Layout]:
    return lambda layout: split(layout, fine, sizes)


def _merger(facts: Facts, run: Sequence[Fine], why: str) -> Callable[[Layout], Layout]:
    def action(layout: Layout) -> Layout:
        flat = Layout((tuple(f for d in layout.dims for f in d),), layout.groups, layout.data)
        return merge(facts, flat, run, why)[0]

    return action


def _incompatible_run(fines: Sequence[Fine], start: int, shape: Sequence[int], dim: int) -> list[Fine]:
    """The shortest run of fine dimensions from `start` that equals a run of new dimensions from `dim`."""
    have, want, i, j = fines[start].size, shape[dim], start + 1, dim + 1
    while have != want or i - start < 2:
        if have <= want:
            have *= fines[i].size
            i += 1
        else:
            want *= shape[j]
            j += 1
    return list(fines[start:i])


def take(facts: Facts, layout: Layout, dim: int, index: np.ndarray, why: str) -> Layout:
    """Positions `index` (1-D, constant) along `dim`.

    A neuron picked alone by a fixed index is that neuron, so it is frozen; several keep to themselves as a set.
    Repeated positions get fresh labels that lie in their source, so that positions frozen later do not unite.
    """
    layout = merged_dim(facts, layout, dim, why)
    if not len(index):
        return uniform([n if d != dim else 0 for d, n in enumerate(layout.shape)], FROZEN, layout.data)
    if not layout.dims[dim]:
        # all positions hold the same neuron of a size-1 dimension
        new: tuple[Fine, ...] = (Fine(len(index), FREE),) if len(index) != 1 else ()
        return layout.with_dims((*layout.dims[:dim], new, *layout.dims[dim + 1 :]))
    (fine,) = layout.dims[dim]
    n = len(index)
    if fine.kind != LABELLED:
        new = (Fine(n, fine.kind),) if n > 1 else ()
        return layout.with_dims((*layout.dims[:dim], new, *layout.dims[dim + 1 :]))
    group = layout.group_of(fine)
    k = group.fines.index(fine)
    labels = np.take(group.labels, index, axis=k)
    others = tuple(g for g in layout.groups if g is not group)
    rest = group.fines[:k] + group.fines[k + 1 :]
    distinct = len(np.unique(index))
    if distinct < fine.size:
        # these neurons as a set do not mix with the ones left behind
        facts.par(labels, facts.frozen((1,), why))
    if distinct < n:
        source = labels
        labels = facts.fresh(source.shape)
        facts.par(labels, source)
    if n == 1:
        if rest:
            others = (*others, Group(np.squeeze(labels, k), rest))
        else:
            facts.freeze(labels, why)
        return Layout((*layout.dims[:dim], (), *layout.dims[dim + 1 :]), others, layout.data)
    new_fine = Fine(n, LABELLED)
    fines = (*group.fines[:k], new_fine, *group.fines[k + 1 :])
    dims = (*layout.dims[:dim], (new_fine,), *layout.dims[dim + 1 :])
    return Layout(dims, (*others, Group(labels, fines)), layout.data)
