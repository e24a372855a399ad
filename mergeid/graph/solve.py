"""From facts about labels to the permutation group: classes, parents, cells.

1. Labels that move together form a class (connected components of eq). Frozenness flows to parents.
2. Parent maps are closed: two maps on the same children that induce one partition are one map, a finer one lies in
   the coarser, and otherwise both lie in their common quotient.
3. Colour refinement: two classes may trade places only if they sit on the same tensor axes and have parents and
   children of the same colours. A cell is a set of classes of one colour.
4. The group is, parents first, a free permutation inside every block of a cell (the members with the same parents),
   blocks following their parents. Blocks without an image freeze their parents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from mergeid.graph.facts import Facts
from mergeid.graph.group import NoImage, random_permutations


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


@dataclass
class Solution:
    """Attributes:
    class_of: label -> class id.
    cells: parents first.
    reason: class id -> index into ``Facts.reasons`` for frozen classes, -1 for others.
    """

    class_of: np.ndarray
    cells: list[Cell]
    reason: np.ndarray
    reasons: list[str] = field(default_factory=list)


def _mix(x: np.ndarray, salt: int) -> np.ndarray:
    """splitmix64: a fixed, well-spread 64-bit hash."""
    z = x.astype(np.uint64) + np.uint64((0x9E3779B97F4A7C15 * (salt + 1)) & 0xFFFFFFFFFFFFFFFF)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _hash(*columns: np.ndarray) -> np.ndarray:
    """One 64-bit hash per row."""
    out = np.zeros(len(columns[0]), np.uint64)
    for k, column in enumerate(columns):
        out = _mix(out ^ _mix(column, 14 + k), 20)
    return out


def _number(keys: np.ndarray) -> np.ndarray:
    """Equal keys get equal numbers from 0."""
    return np.unique(keys, return_inverse=True)[1].reshape(-1)


def _how_many(keys: np.ndarray) -> int:
    """Different ones: by a sort, many times faster than np.unique, which hashes."""
    return int(np.count_nonzero(np.diff(np.sort(keys)))) + min(len(keys), 1)


def _sum_by(index: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """Sum of hashes by index modulo 2⁶⁴: a hash of the multiset."""
    out = np.zeros(n, np.uint64)
    np.add.at(out, index, values)
    return out


class _Solver:
    def __init__(self, facts: Facts) -> None:
        self.n = facts.count
        self.reasons = list(facts.reasons)
        self.eq_a, self.eq_b, self.eq_fact = _flat([])
        # every label's array of origin gives its initial colour
        self.origin = np.repeat(np.arange(len(facts.starts)), np.diff([*facts.starts, self.n]))
        self.label_reason = np.full(self.n, -1, np.int64)
        for labels, why in reversed(facts.freezes):
            self.label_reason[labels] = why
        self.child, self.parent, self.fact = _flat(facts.pars)
        self.next_fact = len(facts.pars)
        # the same pair of labels comes twice in one fact only where its children are not in order
        self.repeated = bool(((np.diff(self.child) <= 0) & (np.diff(self.fact) == 0)).any())
        self.class_of = np.arange(self.n)
        self.count = self.n
        self.new_eqs: list[tuple[np.ndarray, np.ndarray]] = list(facts.eqs)
        self.new_pars: list[tuple[np.ndarray, np.ndarray]] = []
        self.new_labels: list[int] = []

    def classes(self) -> None:
        self.take_in()
        self.rank = _ranks(self.class_of)
        self.reason = np.full(self.count, -1, np.int64)
        hit = np.flatnonzero(self.label_reason >= 0)[::-1]
        self.reason[self.class_of[hit]] = self.label_reason[hit]
        c, p = self.class_of[self.child], self.class_of[self.parent]
        while True:
            flow = (self.reason[c] >= 0) & (self.reason[p] < 0)
            if not flow.any():
                break
            self.reason[p[flow]] = self.reason[c[flow]]
        self.label_reason = np.maximum(self.label_reason, self.reason[self.class_of])
        live = self.reason[c] < 0
        # facts whose children are all frozen say nothing any more
        self.child, self.parent, self.fact = self.child[live], self.parent[live], self.fact[live]
        # a fact relates a class through one of its labels or through another: these are different maps
        kind = _hash(self.fact, self.rank[self.child], self.rank[self.parent]).view(np.int64)
        edges = np.stack([kind, c[live], p[live]], 1)
        inside = edges[:, 1] == edges[:, 2]
        self.loops, edges = edges[inside], edges[~inside]
        if self.repeated:
            _, first = np.unique(_hash(*edges.T), return_index=True)
            first.sort()
            edges = edges[first]
        self.edges = edges

    def cycles(self) -> bool:
        """Unite classes that lie in each other: each decides where the other goes. True if there were any."""
        live = self.edges[self.reason[self.edges[:, 2]] < 0]
        if not len(live):
            return False
        shape = (self.count, self.count)
        graph = coo_matrix((np.ones(len(live), np.int8), (live[:, 1], live[:, 2])), shape=shape)
        count, component = connected_components(graph, directed=True, connection="strong")
        if count == self.count:
            return False
        first = self.representatives()
        order = np.argsort(component, kind="stable")
        same = component[order[1:]] == component[order[:-1]]
        self.add_eq(first[order[1:][same]], first[order[:-1][same]])
        return True

    def representatives(self) -> np.ndarray:
        """The first label of every class."""
        first = np.zeros(self.count, np.int64)
        first[self.class_of[::-1]] = np.arange(self.n)[::-1]
        return first

    def add_eq(self, a: np.ndarray, b: np.ndarray) -> None:
        """Unite classes (given by any of their labels)."""
        self.new_eqs.append((a, b))

    def add_par(self, child: np.ndarray, parent: np.ndarray) -> None:
        self.new_pars.append((child, parent))

    def fresh(self, count: int) -> np.ndarray:
        labels = np.arange(self.n, self.n + count)
        self.n += count
        self.new_labels.append(count)
        return labels

    def take_in(self) -> None:
        """Append what was learned since the last round, and unite classes."""
        if self.new_labels:
            number = np.repeat(self.origin.max(initial=-1) + 1 + np.arange(len(self.new_labels)), self.new_labels)
            self.origin = np.concatenate([self.origin, number])
            self.label_reason = np.concatenate([self.label_reason, np.full(len(number), -1)])
            self.class_of = np.concatenate([self.class_of, self.count + np.arange(len(number))])
            self.count += len(number)
        a, b, fact = _flat(self.new_eqs)
        a_class, b_class = self.class_of[a], self.class_of[b]
        graph = coo_matrix((np.ones(len(a), np.int8), (a_class, b_class)), shape=(self.count, self.count))
        self.count, component = connected_components(graph, directed=False)
        self.class_of = component[self.class_of]
        self.eq_a, self.eq_b = np.concatenate([self.eq_a, a]), np.concatenate([self.eq_b, b])
        self.eq_fact = np.concatenate([self.eq_fact, fact + self.eq_fact.max(initial=-1) + 1])
        if self.new_pars:
            child, parent, fact = _flat(self.new_pars)
            self.repeated |= any(len(np.unique(c)) < len(c) for c, _ in self.new_pars)
            self.child, self.parent = np.concatenate([self.child, child]), np.concatenate([self.parent, parent])
            self.fact = np.concatenate([self.fact, fact + self.next_fact])
            self.next_fact += len(self.new_pars)
        self.new_eqs, self.new_pars, self.new_labels = [], [], []

    def colours(self) -> None:
        """Colour refinement; frozen classes have a colour each.

        Classes trade places label by label, in order of their labels. So they start with one colour only if the same
        facts tie their labels together in that order.
        """
        k = self.count
        colour = _sum_by(self.class_of, _mix(self.origin, 0) ^ _mix(self.rank, 8), k)
        ends = _mix(self.rank[self.eq_a], 9) + _mix(self.rank[self.eq_b], 10)
        colour += _sum_by(self.class_of[self.eq_a], _mix(_mix(self.eq_fact, 11) ^ ends, 12), k)
        colour += _sum_by(self.loops[:, 1], _mix(self.loops[:, 0], 13), k)
        frozen = self.reason >= 0
        colour[frozen] = _mix(np.flatnonzero(frozen), 1)
        # only classes that lie in others, or others in them, tell each other anything
        fact, c, p = self.edges.T
        active = np.zeros(k, bool)
        active[c] = active[p] = True
        within = np.cumsum(active) - 1
        c, p, held = within[c], within[p], frozen[active]
        fact_hash = _mix(fact, 2)
        mine = colour[active]
        count = _how_many(mine)
        while True:
            up = _sum_by(c, _mix(mine[p] ^ fact_hash, 3), len(mine))
            down = _sum_by(p, _mix(mine[c] ^ fact_hash, 4), len(mine))
            new = _mix(mine ^ _mix(up, 5) ^ _mix(down, 6), 7)
            new[held] = mine[held]
            mine = new
            finer = _how_many(mine)
            if finer == count:
                break
            count = finer
        colour[active] = mine
        self.cell_of = _number(colour)

    def close(self) -> bool:
        """Unite, order or join the parent maps of every cell; True if something new was learned."""
        edges = self.edges[self.reason[self.edges[:, 2]] < 0]
        if not len(edges):
            return False
        cells = self.cell_of[edges[:, 1]]
        maps = _number(_hash(cells, edges[:, 0]))
        # maps of one cell that agree in every member are one
        pairs = _hash(edges[:, 1], edges[:, 2])
        whole = _sum_by(maps, _mix(pairs, 30), maps.max() + 1)
        _, first = np.unique(maps, return_index=True)
        _, keep = np.unique(_hash(cells[first], whole), return_index=True)
        alone = np.bincount(_number(cells[first[keep]]))[_number(cells[first[keep]])] == 1
        chosen = np.zeros(len(whole), bool)
        chosen[keep[~alone]] = True
        edges, cells, maps = (x[chosen[maps]] for x in (edges, cells, maps))
        if not len(edges):
            return False
        order = np.lexsort((edges[:, 2], edges[:, 1], edges[:, 0], cells))
        edges, cells = edges[order], cells[order]
        representative = self.representatives()
        known = self._parents_of(np.unique(edges[:, 2]))
        learned = False
        done: set[tuple[bytes, bytes]] = set()
        scratch = np.empty(self.count, np.int64)
        for part in np.split(edges, np.flatnonzero(np.diff(cells)) + 1):
            unique = [rows[:, 1:] for rows in np.split(part, np.flatnonzero(np.diff(part[:, 0])) + 1)]
            # maps of one partition are one map: unite them at once, so that only different partitions meet in pairs
            partitions: dict[tuple[bytes, bytes], np.ndarray] = {}
            for f in unique:
                if not (np.diff(f[:, 0]) > 0).all():
                    continue
                first = partitions.setdefault((f[:, 0].tobytes(), _partition(f[:, 1], scratch).tobytes()), f)
                if first is not f:
                    self.add_eq(representative[first[:, 1]], representative[f[:, 1]])
                    learned = True
            unique = list(partitions.values())
            for i, f in enumerate(unique):
                for g in unique[i + 1 :]:
                    if len(f) != len(g) or not np.array_equal(f[:, 0], g[:, 0]):
                        continue
                    pair = _distinct_pairs(f[:, 1], g[:, 1], self.count)
                    key = (pair[:, 0].tobytes(), pair[:, 1].tobytes())
                    if key in done:
                        continue
                    done.add(key)
                    learned |= self._close_pair(pair, representative, known)
        return learned

    def _parents_of(self, classes: np.ndarray) -> dict[int, set[int]]:
        """Class -> the classes that it lies in."""
        live = np.zeros(self.count, bool)
        live[classes] = True
        pairs = self.edges[live[self.edges[:, 1]] & (self.reason[self.edges[:, 2]] < 0), 1:]
        known: dict[int, set[int]] = {}
        for c, p in _distinct_pairs(pairs[:, 0], pairs[:, 1], self.count).tolist():
            known.setdefault(c, set()).add(p)
        return known

    def _close_pair(self, pair: np.ndarray, rep: np.ndarray, known: dict[int, set[int]]) -> bool:
        """`pair` lists which parent under one map meets which parent under the other."""
        a, b = pair.T
        a_once = len(np.unique(a)) == len(a)
        b_once = len(np.unique(b)) == len(b)
        if a_once and b_once:
            if np.array_equal(a, b):
                return False
            self.add_eq(rep[a], rep[b])
            return True
        if a_once or b_once:
            child, parent = (a, b) if a_once else (b, a)
            pairs = list(zip(child.tolist(), parent.tolist(), strict=True))
            if all(x == y or y in known.get(x, ()) for x, y in pairs):
                return False
            for x, y in pairs:
                known.setdefault(x, set()).add(y)
            self.add_par(rep[child], rep[parent])
            return True
        ua, ia = np.unique(a, return_inverse=True)
        ub, ib = np.unique(b, return_inverse=True)
        graph = coo_matrix((np.ones(len(ia), np.int8), (ia, ib + len(ua))), shape=(len(ua) + len(ub),) * 2)
        count, part = connected_components(graph, directed=False)
        if count == 1:
            return False
        qa, qb = part[: len(ua)], part[len(ua) :]
        # is that quotient known already (a common parent that induces it)?
        if _common_maps(known, [*ua.tolist(), *ub.tolist()], part):
            return False
        quotient = self.fresh(count)
        self.add_par(rep[ua], quotient[qa])
        self.add_par(rep[ub], quotient[qb])
        return True


def _distinct_pairs(a: np.ndarray, b: np.ndarray, count: int) -> np.ndarray:
    """The pairs of classes (numbers below `count`), sorted."""
    code = np.sort(a * count + b)
    code = code[np.diff(code, prepend=-1) > 0]
    return np.stack(np.divmod(code, count), 1)


def _partition(parents: np.ndarray, scratch: np.ndarray) -> np.ndarray:
    """For every child the first with the same parent: equal for maps that put the same children together.

    `scratch` has room for every class."""
    scratch[parents[::-1]] = np.arange(len(parents))[::-1]
    return scratch[parents]


def _flat(facts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of arrays as two long ones, and which fact each entry comes from."""
    if not facts:
        return (np.zeros(0, np.int64),) * 3
    number = np.repeat(np.arange(len(facts)), [len(a) for a, _ in facts])
    return np.concatenate([a for a, _ in facts]), np.concatenate([b for _, b in facts]), number


def _ranks(class_of: np.ndarray) -> np.ndarray:
    """The place of every label among the labels of its class."""
    order = np.argsort(class_of, kind="stable")
    sizes = np.bincount(class_of)
    starts = np.cumsum(sizes) - sizes
    rank = np.empty(len(class_of), np.int64)
    rank[order] = np.arange(len(class_of)) - np.repeat(starts, sizes)
    return rank


def _common_maps(known: dict[int, set[int]], classes: list[int], part: np.ndarray) -> bool:
    """Whether the classes of every part have a parent in common that those of no other part have."""
    shared: dict[int, set[int]] = {}
    for c, k in zip(classes, part.tolist(), strict=True):
        shared[k] = shared[k] & known.get(c, set()) if k in shared else known.get(c, set())
    count = Counter(p for s in shared.values() for p in s)
    return all(any(count[p] == 1 for p in s) for s in shared.values())


def solve(facts: Facts, atoms: np.ndarray) -> Solution:
    """The permutation group that the facts allow.

    Args:
        facts: what the traced forward pass recorded.
        atoms: labels that are indices of parameter axes; only they are permuted in the end.
    """
    solver = _Solver(facts)
    if not solver.n:
        return Solution(np.zeros(0, np.int64), [], np.zeros(0, np.int64), solver.reasons)
    while True:
        solver.classes()
        if solver.cycles():
            continue
        solver.colours()
        if solver.close():
            continue
        cells, bad = _cells(solver, atoms)
        if not bad:
            return Solution(solver.class_of[: facts.count], cells, solver.reason, solver.reasons)
        solver.reasons.append("its blocks would have no image under a permutation of their parents")
        hit = np.isin(solver.class_of, np.array(sorted(bad)))
        solver.label_reason[hit & (solver.label_reason < 0)] = len(solver.reasons) - 1


class _Parents:
    """The classes that each class lies in, as sorted pairs; `direct` leaves out those that follow from the others."""

    def __init__(self, edges: np.ndarray, count: int) -> None:
        self.pairs = _distinct_pairs(edges[:, 1], edges[:, 2], count)
        self.start = np.searchsorted(self.pairs[:, 0], np.arange(count + 1))
        # (c, p) and (p, q) say (c, q)
        lengths = np.diff(self.start)[self.pairs[:, 1]]
        if not lengths.any():
            self.direct, self.direct_start = self.pairs[:, 1], self.start
            return
        child = np.repeat(self.pairs[:, 0], lengths)
        at = np.arange(len(child)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        grand = self.pairs[np.repeat(self.start[self.pairs[:, 1]], lengths) + at, 1]
        direct = self.pairs[~np.isin(_hash(*self.pairs.T), _hash(child, grand))]
        self.direct = direct[:, 1]
        self.direct_start = np.searchsorted(direct[:, 0], np.arange(count + 1))

    def of(self, classes: np.ndarray) -> set[int]:
        """All classes that some of these lie in."""
        return {p for c in classes.tolist() for p in self.pairs[self.start[c] : self.start[c + 1], 1].tolist()}

    def several(self, classes: np.ndarray) -> np.ndarray:
        """Those that lie in more than one."""
        return classes[self.start[classes + 1] - self.start[classes] > 1]

    def matrix(self, classes: np.ndarray) -> np.ndarray | None:
        """Direct parents [classes, parents]; None where the classes have different numbers of them."""
        counts = self.direct_start[classes + 1] - self.direct_start[classes]
        if (counts != counts[0]).any():
            return None
        return self.direct[self.direct_start[classes][:, None] + np.arange(counts[0])]


def _cells(solver: _Solver, atoms: np.ndarray) -> tuple[list[Cell], set[int]]:
    """Cells parents first, and the classes to freeze because their blocks do not fit."""
    free = np.flatnonzero(solver.reason < 0)
    edges = solver.edges[solver.reason[solver.edges[:, 2]] < 0]
    parents = _Parents(edges, solver.count)
    child, parent = parents.pairs.T
    # the position of a class: its first atom, or the first below it
    position = np.full(solver.count, np.iinfo(np.int64).max)
    np.minimum.at(position, solver.class_of[atoms], atoms)
    depth = np.zeros(solver.count, np.int64)
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
    position[nowhere] = len(solver.class_of) + np.flatnonzero(nowhere)
    wanted = ~nowhere
    reached = parents.several(free[nowhere[free]])
    while len(reached):
        wanted[reached] = True
        above = np.array(sorted(parents.of(reached)), np.int64)
        reached = above[~wanted[above]]
    free = free[wanted[free]]
    free = free[np.lexsort((position[free], solver.cell_of[free]))]
    groups = np.split(free, np.flatnonzero(np.diff(solver.cell_of[free])) + 1) if len(free) else []
    groups.sort(key=lambda g: (depth[g[0]], position[g[0]]))
    cell_of = np.full(solver.count, -1)
    place = np.full(solver.count, -1)
    cells: list[Cell] = []
    for group in groups:
        made = _cell(group, parents, cell_of, place)
        if made is None and nowhere[group[0]]:
            made = _by_role(group, edges, cell_of, place)
        if made is None:
            return [], parents.of(group) or set(group.tolist())
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
    order = np.lexsort(keys.T[::-1])
    first = np.flatnonzero(np.r_[True, (np.diff(keys[order], axis=0) != 0).any(1)])
    counts = np.diff(np.r_[first, len(group)])
    if (counts != counts[0]).any():
        return None
    return Cell(group[order].reshape(len(first), -1), tuple(names[0].tolist()), where[order[first]])


def _by_role(group: np.ndarray, edges: np.ndarray, cell_of: np.ndarray, place: np.ndarray) -> Cell | None:
    """A cell whose members lie in two neurons of one cell, told apart by the map that each comes from: the products of
    all pairs of channels, say. None where a map is not defined on every member."""
    rows = edges[np.isin(edges[:, 1], group)]
    order = np.argsort(group)
    columns: dict[bytes, np.ndarray] = {}
    for kind in np.unique(rows[:, 0]).tolist():
        pairs = np.unique(rows[rows[:, 0] == kind, 1:], axis=0)
        if not np.array_equal(pairs[:, 0], group[order]):
            return None
        columns.setdefault(pairs[:, 1].tobytes(), pairs[:, 1])
    above = np.stack(list(columns.values()))
    names, where = cell_of[above], place[above]
    if (names != names[:, :1]).any():
        return None
    blocks, counts = np.unique(where, axis=1, return_counts=True)
    if (counts != counts[0]).any():
        return None
    members = order[np.lexsort(where[::-1])].reshape(-1, counts[0])
    return Cell(group[members], tuple(names[:, 0].tolist()), blocks.T.copy())


def _misfits(cells: list[Cell], trials: int = 24) -> set[int]:
    """Classes whose blocks lack an image under random elements of the group.

    Elements that map the blocks onto themselves are a subgroup, so where it is not everything each trial shows it with
    probability ½ or more. Blocks in at most one parent always have an image.
    """
    wanted: set[int] = set()
    for i in reversed(range(len(cells))):
        if len(cells[i].parents) > 1 or i in wanted:
            wanted |= {i, *cells[i].parents}
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
