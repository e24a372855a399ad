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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from mergeid.neuron_graph.cells import Cell, Edges, cells_of
from mergeid.neuron_graph.facts import Facts
from mergeid.neuron_graph.keys import (
    distinct,
    distinct_pairs,
    first_of_pairs,
    how_many,
    key,
    mix,
    number,
    pieces,
    ranks,
    sum_by,
)


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
        self.child, self.parent, self.fact = _flat([_once(*fact) for fact in facts.pars])
        self.next_fact = len(facts.pars)
        self.class_of = np.arange(self.n)
        self.count = self.n
        self.new_eqs: list[tuple[np.ndarray, np.ndarray]] = list(facts.eqs)
        self.new_pars: list[tuple[np.ndarray, np.ndarray]] = []
        self.new_labels: list[int] = []

    def classes(self) -> None:
        self.take_in()
        self.rank = ranks(self.class_of, self.count)
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
        kind = key(self.fact, self.rank[self.child], self.rank[self.parent]).view(np.int64)
        edges = Edges(kind, c[live], p[live])
        inside = edges.child == edges.parent
        self.loops = edges.at(inside)
        edges = edges.at(~inside)
        self.edges, self.free_edges = edges, edges.at(self.reason[edges.parent] < 0)

    def cycles(self) -> bool:
        """Unite classes that lie in each other: each decides where the other goes. True if there were any."""
        _, child, parent = self.free_edges
        if not len(child):
            return False
        graph = coo_matrix((np.ones(len(child), np.int8), (child, parent)), shape=(self.count, self.count))
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
            arrays = np.repeat(self.origin.max(initial=-1) + 1 + np.arange(len(self.new_labels)), self.new_labels)
            self.origin = np.concatenate([self.origin, arrays])
            self.label_reason = np.concatenate([self.label_reason, np.full(len(arrays), -1)])
            self.class_of = np.concatenate([self.class_of, self.count + np.arange(len(arrays))])
            self.count += len(arrays)
        a, b, fact = _flat(self.new_eqs)
        ends = (a, b) if self.count == self.n else (self.class_of[a], self.class_of[b])
        graph = coo_matrix((np.ones(len(a), np.int8), ends), shape=(self.count, self.count))
        self.count, component = connected_components(graph, directed=False)
        self.class_of = component.astype(np.int64)[self.class_of]
        self.eq_a, self.eq_b = np.concatenate([self.eq_a, a]), np.concatenate([self.eq_b, b])
        self.eq_fact = np.concatenate([self.eq_fact, fact + self.eq_fact.max(initial=-1) + 1])
        if self.new_pars:
            child, parent, fact = _flat([_once(*fact) for fact in self.new_pars])
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
        colour = np.zeros(k, np.uint64)
        for at in pieces(self.n):
            np.add.at(colour, self.class_of[at], key(self.origin[at], self.rank[at]))
        for at in pieces(len(self.eq_a)):
            a, b = self.eq_a[at], self.eq_b[at]
            np.add.at(colour, self.class_of[a], mix(key(self.eq_fact[at], self.rank[a], self.rank[b]), 11))
        colour += sum_by(self.loops.child, mix(self.loops.kind, 13), k)
        frozen = self.reason >= 0
        colour[frozen] = mix(np.flatnonzero(frozen), 1)
        # only classes that lie in others, or others in them, tell each other anything
        fact, c, p = self.edges
        active = np.zeros(k, bool)
        active[c] = active[p] = True
        within = np.cumsum(active) - 1
        c, p, held = within[c], within[p], frozen[active]
        fact_hash = mix(fact, 2)
        mine = colour[active]
        count = how_many(mine)
        while True:
            up = sum_by(c, mix(mine[p] ^ fact_hash, 3), len(mine))
            down = sum_by(p, mix(mine[c] ^ fact_hash, 4), len(mine))
            new = mix(mine ^ mix(up, 5) ^ mix(down, 6), 7)
            new[held] = mine[held]
            mine = new
            finer = how_many(mine)
            if finer == count:
                break
            count = finer
        colour[active] = mine
        self.cell_of = number(colour)

    def close(self) -> bool:
        """Unite, order or join the parent maps of every cell; True if something new was learned."""
        edges = self.free_edges
        if not len(edges.kind):
            return False
        cells = self.cell_of[edges.child]
        several = _several(cells, edges.kind)
        edges, cells = edges.at(several), cells[several]
        if not len(cells):
            return False
        maps = number(key(cells, edges.kind))
        # maps of one cell that agree in every member are one
        whole = sum_by(maps, mix(key(edges.child, edges.parent), 30), maps.max() + 1)
        first = np.empty(len(whole), np.int64)
        first[maps[::-1]] = np.arange(len(maps))[::-1]
        _, keep = np.unique(key(cells[first], whole), return_index=True)
        alone = np.bincount(number(cells[first[keep]]))[number(cells[first[keep]])] == 1
        chosen = np.zeros(len(whole), bool)
        chosen[keep[~alone]] = True
        edges, cells = edges.at(chosen[maps]), cells[chosen[maps]]
        if not len(cells):
            return False
        order = np.lexsort((edges.parent, edges.child, edges.kind, cells))
        edges, cells = edges.at(order), cells[order]
        representative = self.representatives()
        known = self._parents_of(distinct(edges.parent, self.count))
        learned = False
        done: set[tuple[bytes, bytes]] = set()
        scratch = np.empty(self.count, np.int64)
        for maps_of_cell in _maps(edges, cells):
            # maps of one partition are one map: unite them at once, so that only different partitions meet in pairs
            partitions: dict[tuple[bytes, bytes], tuple[np.ndarray, np.ndarray]] = {}
            for child, parent in maps_of_cell:
                if not (np.diff(child) > 0).all():
                    continue
                said = child.tobytes(), _partition(parent, scratch).tobytes()
                known_as = partitions.setdefault(said, (child, parent))[1]
                if known_as is not parent:
                    self.add_eq(representative[known_as], representative[parent])
                    learned = True
            unique = list(partitions.values())
            for i, (child, parent) in enumerate(unique):
                for other_child, other in unique[i + 1 :]:
                    if not np.array_equal(child, other_child):
                        continue
                    pair = distinct_pairs(parent, other, self.count)
                    both = pair[:, 0].tobytes(), pair[:, 1].tobytes()
                    if both in done:
                        continue
                    done.add(both)
                    learned |= self._close_pair(pair, representative, known)
        return learned

    def _parents_of(self, classes: np.ndarray) -> dict[int, set[int]]:
        """Class -> the classes that it lies in."""
        wanted = np.zeros(self.count, bool)
        wanted[classes] = True
        _, child, parent = self.free_edges.at(wanted[self.free_edges.child])
        known: dict[int, set[int]] = {}
        for c, p in distinct_pairs(child, parent, self.count).tolist():
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


def _maps(edges: Edges, cells: np.ndarray) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """For every cell its maps, (children, parents), of edges ordered by cell and kind."""
    new_cell = np.diff(cells) != 0
    new_map = new_cell | (np.diff(edges.kind) != 0)
    starts = [0, *(np.flatnonzero(new_map) + 1).tolist(), len(cells)]
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for begin, end in pairwise(starts):
        if begin and new_cell[begin - 1]:
            yield found
            found = []
        found.append((edges.child[begin:end], edges.parent[begin:end]))
    yield found


def _once(child: np.ndarray, parent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The fact with every pair of labels once."""
    if len(child) < 2 or bool((np.diff(child) > 0).all()) or how_many(child) == len(child):
        return child, parent
    first = first_of_pairs(child, parent)
    return child[first], parent[first]


def _several(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Which entries lie in a group with different values."""
    one = np.empty(int(groups.max()) + 1, values.dtype)
    one[groups] = values
    mixed = np.zeros(len(one), bool)
    mixed[groups[values != one[groups]]] = True
    answer: np.ndarray = mixed[groups]
    return answer


def _partition(parents: np.ndarray, scratch: np.ndarray) -> np.ndarray:
    """For every child the first with the same parent: equal for maps that put the same children together.

    `scratch` has room for every class."""
    scratch[parents[::-1]] = np.arange(len(parents))[::-1]
    answer: np.ndarray = scratch[parents]
    return answer


def _flat(facts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of arrays as two long ones, and which fact each entry comes from."""
    if not facts:
        return (np.zeros(0, np.int64),) * 3
    number = np.repeat(np.arange(len(facts)), [len(a) for a, _ in facts])
    return np.concatenate([a for a, _ in facts]), np.concatenate([b for _, b in facts]), number


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
        cells, bad = cells_of(solver.free_edges, solver.reason < 0, solver.class_of, solver.cell_of, atoms)
        if not bad:
            return Solution(solver.class_of[: facts.count], cells, solver.reason, solver.reasons)
        solver.reasons.append("its blocks would have no image under a permutation of their parents")
        hit = np.isin(solver.class_of, np.array(sorted(bad)))
        solver.label_reason[hit & (solver.label_reason < 0)] = len(solver.reasons) - 1
