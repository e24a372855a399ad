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


def _sum_by(index: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """Sum of hashes by index modulo 2⁶⁴: a hash of the multiset."""
    out = np.zeros(n, np.uint64)
    np.add.at(out, index, values)
    return out


class _Solver:
    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.n = facts.count
        self.reasons = list(facts.reasons)
        eqs = facts.eqs
        self.eq_a = np.concatenate([a for a, _ in eqs]) if eqs else np.zeros(0, np.int64)
        self.eq_b = np.concatenate([b for _, b in eqs]) if eqs else np.zeros(0, np.int64)
        self.eq_fact = np.repeat(np.arange(len(eqs)), [len(a) for a, _ in eqs])
        self.class_of = np.zeros(0, np.int64)
        # every label's array of origin gives its initial colour
        starts = np.array(facts.starts, np.int64)
        self.origin = np.searchsorted(starts, np.arange(self.n), side="right") - 1
        label_reason = np.full(self.n, -1, np.int64)
        for labels, why in reversed(facts.freezes):
            label_reason[labels] = why
        self.label_reason = label_reason
        self.par_child = [c for c, _ in facts.pars]
        self.par_parent = [p for _, p in facts.pars]
        self._uniq_pars()

    def _uniq_pars(self) -> None:
        """All parent facts as three flat arrays (child label, parent label, fact)."""
        if self.par_child:
            self.child = np.concatenate(self.par_child)
            self.parent = np.concatenate(self.par_parent)
            self.fact = np.repeat(np.arange(len(self.par_child)), [len(c) for c in self.par_child])
        else:
            self.child = self.parent = self.fact = np.zeros(0, np.int64)
        self.next_fact = len(self.par_child)

    def classes(self) -> None:
        graph = coo_matrix((np.ones(len(self.eq_a), np.int8), (self.eq_a, self.eq_b)), shape=(self.n, self.n))
        count, self.class_of = connected_components(graph, directed=False)
        self.count = count
        self.rank = _ranks(self.class_of)
        self.reason = np.full(count, -1, np.int64)
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
        kind = np.stack([self.fact, self.rank[self.child], self.rank[self.parent]], 1)
        kind = np.unique(kind, axis=0, return_inverse=True)[1].reshape(-1) if len(kind) else self.fact
        edges = np.stack([kind, c[live], p[live]], 1)
        inside = edges[:, 1] == edges[:, 2]
        self.loops, edges = edges[inside], edges[~inside]
        if len(edges):
            _, first = np.unique(_rows(edges), return_index=True)
            first.sort()
            edges = edges[first]
        self.edges = edges

    def cycles(self) -> bool:
        """Unite classes that lie in each other: each decides where the other goes. True if there were any."""
        live = self.edges[self.reason[self.edges[:, 2]] < 0] if len(self.edges) else self.edges
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
        self.eq_a = np.concatenate([self.eq_a, a])
        self.eq_b = np.concatenate([self.eq_b, b])
        self.eq_fact = np.concatenate([self.eq_fact, np.full(len(a), self.eq_fact.max(initial=-1) + 1)])

    def add_par(self, child: np.ndarray, parent: np.ndarray) -> None:
        self.child = np.concatenate([self.child, child])
        self.parent = np.concatenate([self.parent, parent])
        self.fact = np.concatenate([self.fact, np.full(len(child), self.next_fact)])
        self.next_fact += 1

    def fresh(self, count: int) -> np.ndarray:
        labels = np.arange(self.n, self.n + count)
        self.n += count
        self.origin = np.concatenate([self.origin, np.full(count, self.origin.max(initial=-1) + 1)])
        self.label_reason = np.concatenate([self.label_reason, np.full(count, -1)])
        return labels

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
        fact, c, p = self.edges.T if len(self.edges) else np.zeros((3, 0), np.int64)
        fact_hash = _mix(fact, 2)
        ids, groups = np.unique(colour, return_inverse=True)
        while True:
            up = _sum_by(c, _mix(colour[p] ^ fact_hash, 3), k)
            down = _sum_by(p, _mix(colour[c] ^ fact_hash, 4), k)
            new = _mix(colour ^ _mix(up, 5) ^ _mix(down, 6), 7)
            new[frozen] = colour[frozen]
            new_ids, groups = np.unique(new, return_inverse=True)
            if len(new_ids) == len(ids):
                break
            ids, colour = new_ids, new
        self.cell_of = groups

    def close(self) -> bool:
        """Unite, order or join the parent maps of every cell; True if something new was learned."""
        live = self.reason[self.edges[:, 2]] < 0 if len(self.edges) else np.zeros(0, bool)
        edges = self.edges[live]
        if not len(edges):
            return False
        representative = self.representatives()
        cells = self.cell_of[edges[:, 1]]
        order = np.lexsort((edges[:, 2], edges[:, 1], edges[:, 0], cells))
        edges, cells = edges[order], cells[order]
        known: dict[int, set[int]] = {}
        for c, p in np.unique(edges[:, 1:], axis=0).tolist():
            known.setdefault(c, set()).add(p)
        learned = False
        bounds = np.flatnonzero(np.diff(cells)) + 1
        done: set[tuple[bytes, bytes]] = set()
        for part in np.split(edges, bounds):
            maps: dict[bytes, np.ndarray] = {}
            for rows in np.split(part, np.flatnonzero(np.diff(part[:, 0])) + 1):
                pairs = rows[:, 1:]
                if len(np.unique(pairs[:, 0])) == len(pairs):
                    maps.setdefault(pairs.tobytes(), pairs)
            # maps of one partition are one map: unite them at once, so that only different partitions meet in pairs
            partitions: dict[tuple[bytes, bytes], np.ndarray] = {}
            for pairs in maps.values():
                key = (pairs[:, 0].tobytes(), _partition(pairs[:, 1]).tobytes())
                first = partitions.setdefault(key, pairs)
                if not np.array_equal(first[:, 1], pairs[:, 1]):
                    self.add_eq(representative[first[:, 1]], representative[pairs[:, 1]])
                    learned = True
            unique = list(partitions.values())
            for i, f in enumerate(unique):
                for g in unique[i + 1 :]:
                    if len(f) != len(g) or not np.array_equal(f[:, 0], g[:, 0]):
                        continue
                    pair = np.unique(np.stack([f[:, 1], g[:, 1]], 1), axis=0)
                    key = (pair[:, 0].tobytes(), pair[:, 1].tobytes())
                    if key in done:
                        continue
                    done.add(key)
                    learned |= self._close_pair(pair, representative, known)
        return learned

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


def _partition(parents: np.ndarray) -> np.ndarray:
    """Numbers of the parents in order of first appearance: equal for maps that put the same children together."""
    _, first, inverse = np.unique(parents, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _ranks(class_of: np.ndarray) -> np.ndarray:
    """The place of every label among the labels of its class."""
    order = np.argsort(class_of, kind="stable")
    sizes = np.bincount(class_of)
    starts = np.cumsum(sizes) - sizes
    rank = np.empty(len(class_of), np.int64)
    rank[order] = np.arange(len(class_of)) - np.repeat(starts, sizes)
    return rank


def _rows(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a).view([("", a.dtype)] * a.shape[1]).reshape(-1)


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


def _cells(solver: _Solver, atoms: np.ndarray) -> tuple[list[Cell], set[int]]:
    """Cells parents first, and the classes to freeze because their blocks do not fit."""
    free = np.flatnonzero(solver.reason < 0)
    edges = solver.edges[solver.reason[solver.edges[:, 2]] < 0] if len(solver.edges) else solver.edges
    parents: dict[int, set[int]] = {}
    for _, c, p in edges.tolist():
        parents.setdefault(c, set()).add(p)
    # the position of a class: its first atom, or the first below it
    position = np.full(solver.count, np.iinfo(np.int64).max)
    np.minimum.at(position, solver.class_of[atoms], atoms)
    depth = np.zeros(solver.count, np.int64)
    for _ in range(64):
        before = position.copy(), depth.copy()
        if len(edges):
            np.minimum.at(position, edges[:, 2], position[edges[:, 1]])
            np.maximum.at(depth, edges[:, 1], depth[edges[:, 2]] + 1)
        if np.array_equal(before[0], position) and np.array_equal(before[1], depth):
            break
    else:
        return [], set(edges[:, 1].tolist())  # deeper than any network
    # no atom lies in these, but where they join two parents, those are bound to each other
    nowhere = position == np.iinfo(np.int64).max
    position[nowhere] = len(solver.class_of) + np.flatnonzero(nowhere)
    wanted = ~nowhere
    queue = [c for c in free[nowhere[free]].tolist() if len(parents.get(c, ())) > 1]
    while queue:
        c = queue.pop()
        if not wanted[c]:
            wanted[c] = True
            queue += parents.get(c, ())
    free = free[wanted[free]]
    free = free[np.lexsort((position[free], solver.cell_of[free]))]
    groups = np.split(free, np.flatnonzero(np.diff(solver.cell_of[free])) + 1) if len(free) else []
    groups.sort(key=lambda g: (depth[g[0]], position[g[0]]))
    cell_at: dict[int, tuple[int, int]] = {}
    cells: list[Cell] = []
    for group in groups:
        made = _cell(group, parents, cell_at)
        if isinstance(made, set):
            return [], made
        for k, c in enumerate(made.members.reshape(-1).tolist()):
            cell_at[c] = (len(cells), k)
        cells.append(made)
    bad = _misfits(cells)
    return _with_atoms(cells, nowhere), bad


def _with_atoms(cells: list[Cell], nowhere: np.ndarray) -> list[Cell]:
    keep = [i for i, c in enumerate(cells) if not nowhere[c.members.flat[0]]]
    at = {i: k for k, i in enumerate(keep)}
    return [Cell(c.members, tuple(at[p] for p in c.parents), c.block_parents) for c in (cells[i] for i in keep)]


def _cell(group: np.ndarray, parents: dict[int, set[int]], cell_at: dict[int, tuple[int, int]]) -> Cell | set[int]:
    blocks: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for c in group.tolist():
        mine = parents.get(c, set())
        implied = {q for p in mine for q in parents.get(p, set())}
        key = tuple(sorted(cell_at[p] for p in mine - implied))
        blocks.setdefault(key, []).append(c)
    keys = sorted(blocks)
    shape = {(len(blocks[k]), tuple(cell for cell, _ in k)) for k in keys}
    cells_of = keys[0]
    names = tuple(cell for cell, _ in cells_of)
    if len(shape) > 1 or len(set(names)) < len(names):
        # unequal blocks, or two parents in one cell: no rule to move them by
        return {p for c in group.tolist() for p in parents.get(c, set())} or set(group.tolist())
    members = np.array([blocks[k] for k in keys], np.int64)
    where = np.array([[m for _, m in k] for k in keys], np.int64).reshape(len(keys), len(names))
    return Cell(members, names, where)


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
