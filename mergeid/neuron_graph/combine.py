"""Elementwise operations, contractions and reductions: one rule.

All of them are a virtual elementwise product over named letters, followed by a sum over the letters that the
output does not have. Where the operands' label groups coincide they move together (eq); where one is a part of the
other the larger lies in the smaller (par); where they overlap both lie in fresh labels of the overlap. Summing over
part of a group leaves fresh labels for the rest, and the summed neurons lie in them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import prod

from mergeid.neuron_graph.facts import Facts, Labels
from mergeid.neuron_graph.layout import FREE, FROZEN, LABELLED, Fine, Group, Layout, merge, split

Letter = Hashable
Slot = tuple[Letter, int]


@dataclass
class Operand:
    """A layout with a letter for every dimension."""

    layout: Layout
    letters: tuple[Letter, ...]

    def fines(self, letter: Letter) -> tuple[Fine, ...]:
        return self.layout.dims[self.letters.index(letter)] if letter in self.letters else ()

    def cuts(self, letter: Letter) -> list[int]:
        """Sizes of the suffixes of the letter's fine dimensions, from 1 to the full size."""
        sizes, total = [1], 1
        for f in reversed(self.fines(letter)):
            total *= f.size
            sizes.append(total)
        return sizes


def _refine(facts: Facts, operands: list[Operand], letter: Letter, why: str) -> list[int]:
    """Cut the letter of all operands into the same fine dimensions; returns their sizes, outer first."""
    present = [o for o in operands if o.fines(letter)]
    if not present:
        return []
    common = set.intersection(*(set(o.cuts(letter)) for o in present))
    bounds = sorted(common)
    sizes: list[int] = []  # inner first
    for low, high in zip(bounds, bounds[1:], strict=False):
        inner = sorted({c for o in present for c in o.cuts(letter) if low <= c <= high})
        if all(b % a == 0 for a, b in zip(inner, inner[1:], strict=False)):
            sizes += [b // a for a, b in zip(inner, inner[1:], strict=False)]
        else:
            sizes.append(high // low)
    for o in present:
        _cut(facts, o, letter, sizes, why)
    return sizes[::-1]


def _cut(facts: Facts, operand: Operand, letter: Letter, sizes: Sequence[int], why: str) -> None:
    """Bring the letter's fine dimensions to `sizes` (inner first), splitting or merging."""
    done = 0  # how many inner fine dimensions already fit
    for size in sizes:
        while True:
            fines = operand.fines(letter)
            fine = fines[len(fines) - 1 - done]
            if fine.size == size:
                break
            if fine.size % size == 0:
                operand.layout = split(operand.layout, fine, [fine.size // size, size])
                continue
            run = [fine]
            while prod(f.size for f in run) < size:
                run.insert(0, fines[len(fines) - 1 - done - len(run)])
            operand.layout, _ = merge(facts, operand.layout, run, why)
        done += 1


def combine(
    facts: Facts,
    operands: Sequence[tuple[Layout, Sequence[Letter]]],
    out: Sequence[Letter],
    why: str,
) -> Layout:
    """Layout of ``einsum``-like ``operands -> out``; dimensions of size 1 broadcast.

    Args:
        operands: layouts with one letter per dimension; a letter occurs at most once in an operand.
        out: letters of the result; the others are summed.
        why: what to name when a frozen dimension freezes labels.
    """
    ops = [Operand(layout, tuple(letters)) for layout, letters in operands]
    letters: list[Letter] = list(dict.fromkeys([*out, *(x for o in ops for x in o.letters)]))
    slots: dict[Letter, list[Slot]] = {}
    size_of: dict[Slot, int] = {}
    for letter in letters:
        sizes = _refine(facts, ops, letter, why)
        slots[letter] = [(letter, i) for i in range(len(sizes))]
        size_of.update(zip(slots[letter], sizes, strict=True))
    order = {s: i for i, s in enumerate(size_of)}

    table: dict[tuple[Slot, ...], Labels] = {}
    any_frozen: set[Slot] = set()

    def put(key: tuple[Slot, ...], labels: Labels) -> None:
        if key in table:
            facts.eq(labels, table[key])
        else:
            table[key] = labels

    frozen_sets: list[set[Slot]] = []
    for o in ops:
        slot_of = {f: s for letter in o.letters for f, s in zip(o.fines(letter), slots[letter], strict=False)}
        frozen = {s for f, s in slot_of.items() if f.kind == FROZEN}
        frozen_sets.append(frozen)
        any_frozen |= frozen
        for g in o.layout.groups:
            fines = sorted(g.fines, key=lambda f: order[slot_of[f]])
            put(tuple(slot_of[f] for f in fines), g.ordered(fines))
            facts.reads.append(g.labels.reshape(-1))

    # frozen dimensions of one operand against label groups of another
    for key in list(table):
        held = {s for s in key if s in any_frozen}
        if held == set(key):
            facts.freeze(table.pop(key), why)
        elif held:
            part = tuple(s for s in key if s in held)
            labels = facts.frozen([size_of[s] for s in part], why)
            facts.par(table[key], _spread(labels, part, key))

    keep = {s for letter in out for s in slots[letter]}
    _add_overlaps(facts, table, keep, any_frozen, size_of)

    # the result: the largest groups that survive
    alive = [k for k in table if set(k) <= keep]
    alive = [k for k in alive if not any(set(k) < set(m) for m in alive)]
    alive = _disjoint(facts, table, alive, size_of)
    covered = {s for k in alive for s in k}
    fine_of: dict[Slot, Fine] = {}
    dims: list[tuple[Fine, ...]] = []
    for letter in out:
        for s in slots[letter]:
            kind = LABELLED if s in covered else FROZEN if s in any_frozen else FREE
            fine_of[s] = Fine(size_of[s], kind)
        dims.append(tuple(fine_of[s] for s in slots[letter]))
    groups = tuple(Group(table[k], tuple(fine_of[s] for s in k)) for k in alive)
    return Layout(tuple(dims), groups, any(o.layout.data for o in ops))


def _add_overlaps(
    facts: Facts,
    table: dict[tuple[Slot, ...], Labels],
    keep: set[Slot],
    any_frozen: set[Slot],
    size_of: dict[Slot, int],
) -> None:
    """Labels for overlaps of groups, and for what is left of each group after the sum; larger groups lie in them."""
    for key in list(table):
        left = tuple(s for s in key if s in keep)
        if left and left != key and left not in table and not set(left) <= any_frozen:
            table[left] = facts.fresh([size_of[s] for s in left])
    keys = list(table)
    for i, a in enumerate(keys):
        for b in keys[i + 1 :]:
            both = tuple(s for s in a if s in b)
            if both and both not in table and not set(both) <= any_frozen:
                table[both] = facts.fresh([size_of[s] for s in both])
    keys = sorted(table, key=len)
    for i, small in enumerate(keys):
        for large in keys[i + 1 :]:
            if len(small) < len(large) and set(small) < set(large):
                facts.par(table[large], _spread(table[small], small, large))


def _spread(labels: Labels, part: tuple[Slot, ...], whole: tuple[Slot, ...]) -> Labels:
    """Labels on `part` as an array that broadcasts over `whole` (both in the same slot order)."""
    shape, i = [], 0
    for s in whole:
        shape.append(labels.shape[i] if s in part else 1)
        i += s in part
    return labels.reshape(shape)


def _disjoint(
    facts: Facts,
    table: dict[tuple[Slot, ...], Labels],
    alive: list[tuple[Slot, ...]],
    size_of: dict[Slot, int],
) -> list[tuple[Slot, ...]]:
    """Replace overlapping groups by fresh labels of every combination, each lying in its parts."""
    order = {s: i for i, s in enumerate(size_of)}
    while True:
        pair = next(
            ((a, b) for i, a in enumerate(alive) for b in alive[i + 1 :] if set(a) & set(b)),
            None,
        )
        if pair is None:
            return alive
        a, b = pair
        key = tuple(sorted({*a, *b}, key=order.__getitem__))
        if key not in table:
            table[key] = facts.fresh([size_of[s] for s in key])
        for part in pair:
            facts.par(table[key], _spread(table[part], part, key))
        alive = [k for k in alive if not set(k) <= set(key)] + [key]


def elementwise(facts: Facts, layouts: Sequence[Layout], ndim: int, why: str) -> Layout:
    """Broadcasting elementwise operation, dimensions aligned from the right."""
    return combine(
        facts,
        [(x, range(ndim - len(x.dims), ndim)) for x in layouts],
        range(ndim),
        why,
    )


def reduce(facts: Facts, layout: Layout, dims: Sequence[int], keepdim: bool, why: str) -> Layout:
    """A permutation-invariant reduction over `dims` (sum, mean, max, norm, …)."""
    n = len(layout.dims)
    gone = {d % n for d in dims} if n else set()
    result = combine(facts, [(layout, range(n))], [d for d in range(n) if d not in gone], why)
    if not keepdim:
        return result
    kept = iter(result.dims)
    return result.with_dims(() if d in gone else next(kept) for d in range(n))


def relate(facts: Facts, a: Layout, b: Layout, why: str) -> None:
    """The values of b are written over those of a (same shape): their neurons must agree."""
    elementwise(facts, [a, b], max(len(a.dims), len(b.dims)), why)
