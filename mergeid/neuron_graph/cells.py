"""The group, parents first: classes of one colour in blocks, each block following the members that it lies in."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np

from mergeid.neuron_graph.group import NoImage, random_permutations
from mergeid.neuron_graph.keys import distinct_pairs, in_order, spans

MOST = 2**62
"""Combinations of parents that int64 can count."""


class Edges(NamedTuple):
    """Class `child` lies in class `parent` under a map of this `kind`: three arrays of one length."""

    kind: np.ndarray
    child: np.ndarray
    parent: np.ndarray

    def at(self, which: np.ndarray) -> Edges:
        return Edges(self.kind[which], self.child[which], self.parent[which])


@dataclass
class Cell:
    """A set of interchangeable classes in blocks.

    Attributes:
        members: class ids, [blocks, members per block].
        parents: cells that the blocks lie in.
        block_parents: [blocks, len(parents)], flat member position of every parent.
    """

    members: np.ndarray
    parents: tuple[int, ...]
    block_parents: np.ndarray


class _Parents:
    """The classes that each class lies in, as sorted pairs; `direct` leaves out those that follow from the others."""

    def __init__(self, child: np.ndarray, parent: np.ndarray, count: int) -> None:
        self.pairs = distinct_pairs(child, parent, count)
        self.start = _starts(self.pairs[:, 0], count)
        # (c, p) and (p, q) say (c, q)
        lengths = np.diff(self.start)[self.pairs[:, 1]]
        if not lengths.any():
            self.direct, self.direct_start = self.pairs[:, 1], self.start
            return
        below = np.repeat(self.pairs[:, 0], lengths)
        grand = self.pairs[spans(self.start[self.pairs[:, 1]], lengths), 1]
        code = self.pairs[:, 0] * count + self.pairs[:, 1]
        implied = np.sort(below * count + grand)
        where = np.minimum(np.searchsorted(code, implied), len(code) - 1)
        follows = np.zeros(len(code), bool)
        follows[where[code[where] == implied]] = True
        self.direct = self.pairs[~follows, 1]
        self.direct_start = _starts(self.pairs[~follows, 0], count)

    def of(self, classes: np.ndarray) -> np.ndarray:
        """All classes that some of these lie in, sorted."""
        start = self.start[classes]
        return np.unique(self.pairs[spans(start, self.start[classes + 1] - start), 1])

    def several(self, classes: np.ndarray) -> np.ndarray:
        """Those that lie in more than one."""
        answer: np.ndarray = classes[self.start[classes + 1] - self.start[classes] > 1]
        return answer

    def matrix(self, classes: np.ndarray) -> np.ndarray | None:
        """Direct parents [classes, parents]; None where the classes have different numbers of them."""
        counts = self.direct_start[classes + 1] - self.direct_start[classes]
        if (counts != counts[0]).any():
            return None
        answer: np.ndarray | None = self.direct[self.direct_start[classes][:, None] + np.arange(counts[0])]
        return answer


def _starts(ordered: np.ndarray, count: int) -> np.ndarray:
    """Where each number below `count` starts among ordered ones, [count + 1]."""
    return np.concatenate([[0], np.cumsum(np.bincount(ordered, minlength=count))])


def cells_of(
    edges: Edges, free: np.ndarray, class_of: np.ndarray, colour: np.ndarray, atoms: np.ndarray
) -> tuple[list[Cell], set[int]]:
    """Cells parents first, and the classes to freeze because their blocks do not fit.

    Args:
        edges: which classes lie in which, frozen ones left out.
        free: bool, the classes that are not frozen.
        class_of: label -> class.
        colour: class -> number of its colour.
        atoms: labels that are indices of parameter axes, ascending.
    """
    count = len(free)
    parents = _Parents(edges.child, edges.parent, count)
    child, parent = parents.pairs.T
    # the position of a class: its first atom, or the first below it
    position = np.full(count, np.iinfo(np.int64).max)
    position[class_of[atoms][::-1]] = atoms[::-1]
    depth = np.zeros(count, np.int64)
    for _ in range(64):
        before = position.copy(), depth.copy()
        np.minimum.at(position, parent, position[child])
        np.maximum.at(depth, child, depth[parent] + 1)
        if np.array_equal(before[0], position) and np.array_equal(before[1], depth):
            break
    else:
        return [], set(child.tolist())  # deeper than any network
    # no atom lies in these, but where they join two parents, those are bound to each other
    nowhere = position == np.iinfo(np.int64).max
    position[nowhere] = len(class_of) + np.flatnonzero(nowhere)
    wanted = ~nowhere
    reached = parents.several(np.flatnonzero(free & nowhere))
    while len(reached):
        wanted[reached] = True
        above = parents.of(reached)
        reached = above[~wanted[above]]
    members = np.flatnonzero(free & wanted)
    members = members[np.lexsort((position[members], colour[members]))]
    groups = np.split(members, np.flatnonzero(np.diff(colour[members])) + 1) if len(members) else []
    groups.sort(key=lambda g: (depth[g[0]], position[g[0]]))
    roles = _Roles(edges, count)
    cell_of = np.full(count, -1)
    place = np.full(count, -1)
    cells: list[Cell] = []
    for group in groups:
        made = _cell(group, parents, cell_of, place)
        if made is None:
            made = roles.cell(group, cell_of, place)
        if made is None:
            return [], set(parents.of(group).tolist()) or set(group.tolist())
        flat = made.members.reshape(-1)
        cell_of[flat], place[flat] = len(cells), np.arange(len(flat))
        cells.append(made)
    bad = _misfits(cells)
    return _with_atoms(cells, nowhere), bad


def _with_atoms(cells: list[Cell], nowhere: np.ndarray) -> list[Cell]:
    keep = [i for i, c in enumerate(cells) if not nowhere[c.members.flat[0]]]
    at = {i: k for k, i in enumerate(keep)}
    return [Cell(c.members, tuple(at[p] for p in c.parents), c.block_parents) for c in (cells[i] for i in keep)]


def _cell(group: np.ndarray, parents: _Parents, cell_of: np.ndarray, place: np.ndarray) -> Cell | None:
    """The group in blocks of the same parents; None for unequal blocks, or two parents in one cell: there is no rule to
    move them by."""
    above = parents.matrix(group)
    if above is None:
        return None
    width = len(place)
    keys = np.sort(cell_of[above] * width + place[above], axis=1)
    names, where = keys // width, keys % width
    if (names != names[0]).any() or (np.diff(names[0]) == 0).any():
        return None
    if not keys.shape[1]:
        return Cell(group[None], (), np.zeros((1, 0), np.int64))
    return _in_blocks(group, tuple(names[0].tolist()), where)


def _in_blocks(members: np.ndarray, parents: tuple[int, ...], where: np.ndarray) -> Cell | None:
    """Members in blocks of the same positions in their parents, `where` [members, parents]; None for unequal blocks."""
    order = np.lexsort(where.T[::-1])
    first = np.flatnonzero(np.r_[True, (np.diff(where[order], axis=0) != 0).any(1)])
    counts = np.diff(np.r_[first, len(members)])
    if (counts != counts[0]).any():
        return None
    return Cell(members[order].reshape(len(first), -1), parents, where[order[first]])


class _Roles:
    """Cells whose members lie in two neurons of one cell, told apart by the map that each comes from: the products of
    all pairs of channels, say."""

    def __init__(self, edges: Edges, count: int) -> None:
        self.edges = edges
        self.count = count
        self.by_child: tuple[np.ndarray, np.ndarray] | None = None

    def cell(self, group: np.ndarray, cell_of: np.ndarray, place: np.ndarray) -> Cell | None:
        """None where a map is not defined on every member, or combinations of parents are too many to be counted."""
        if self.by_child is None:
            self.by_child = in_order(self.edges.child, self.count)
        order, start = self.by_child
        rows = order[spans(start[group], start[group + 1] - start[group])]
        kind, child, parent = (column[rows] for column in self.edges)
        names, kinds = np.unique(kind, return_inverse=True)
        rows, start = in_order(kinds, len(names))
        ordered = np.sort(group)
        columns: dict[bytes, np.ndarray] = {}
        for begin, end in zip(start[:-1].tolist(), start[1:].tolist(), strict=True):
            pairs = distinct_pairs(child[rows[begin:end]], parent[rows[begin:end]], self.count)
            if not np.array_equal(pairs[:, 0], ordered):
                return None
            columns.setdefault(pairs[:, 1].tobytes(), pairs[:, 1].copy())
        above = np.stack(list(columns.values()))
        cells, where = cell_of[above], place[above]
        if (cells != cells[:, :1]).any() or prod(int((cell_of == c).sum()) for c in cells[:, 0]) >= MOST:
            return None
        return _in_blocks(ordered, tuple(cells[:, 0].tolist()), where.T)


def _misfits(cells: list[Cell], trials: int = 24) -> set[int]:
    """Classes whose blocks lack an image under random elements of the group.

    Elements that map the blocks onto themselves are a subgroup, so where it is not everything each trial shows it with
    probability ½ or more. Blocks in at most one parent always have an image, and so have those in every combination
    of parents.
    """
    wanted: set[int] = set()
    for i in reversed(range(len(cells))):
        parents = cells[i].parents
        joins = len(parents) > 1 and len(cells[i].block_parents) < prod(cells[p].members.size for p in parents)
        if joins or i in wanted:
            wanted |= {i, *parents}
    some = sorted(wanted)
    at = {i: k for k, i in enumerate(some)}
    structures = [
        (cells[i].members.shape, tuple(at[p] for p in cells[i].parents), cells[i].block_parents) for i in some
    ]
    rng = np.random.default_rng(0)
    for _ in range(trials if some else 0):
        try:
            random_permutations(structures, rng.permutation)
        except NoImage as e:
            return {int(c) for p in cells[some[e.cell]].parents for c in cells[p].members.reshape(-1)}
    return set()
