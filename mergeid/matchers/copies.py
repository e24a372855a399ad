"""Permuted copies: the order that makes B's tensors equal to A's, number for number.

Where all tensors of B hold the numbers of A's, B is a permuted copy as a rule, and then its order need not be the best
of anything: it is read off. That is colour refinement (Weisfeiler & Leman 1968): members of both models get as colours
hashes of the numbers that meet at them and of the colours of the positions that those stand at, of the blocks that they
lie in and of what lies in them, until no colour splits. Coordinate descent over the same spaces stops where two must
move together, as the dimensions of a head do under a norm that all heads share.

Members that still have one colour are told apart by a choice, which is taken back where it leads to a contradiction
(McKay 1981): all of a space at once first, as they lie where they can, since alike neurons may go anywhere; then one by
one. The order counts only if it makes all tensors equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import numpy as np
import torch
from torch import Tensor

from mergeid.neuron_graph.group import block_ranks
from mergeid.neuron_graph.neuron_graph import AxisMap, Element, NeuronGraph, Space

PIECE = 1 << 16
"""Numbers of a tensor that are hashed at once: they stay in the cache."""
ODD, ODDER = 0x1B873593CC9E2D51 | 1, -0x61C8864680B583EB
"""Multipliers of the hashes, modulo 2^64; the second is the golden ratio's."""
PASSES, LEAST_WORK = 4, 1 << 26
"""Numbers that are hashed before the search is given up: so many passes over both models, or at least so many."""
LEAST_STEP = 1 << 13
"""Numbers that the hashing of a tensor counts for, however small it is."""

Colours = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Of A and of B: space id -> int64 [size]. Tensors are replaced, never written into."""


class _NoCopy(Exception):
    """The colours of A and B differ."""


class _Spent(Exception):
    """The search takes too long."""


def same_numbers(graph: NeuronGraph, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether every tensor with a space on it holds the same numbers in A and in B, in whatever order; small ones are
    compared first, so that other models are told at once."""
    names = sorted(graph.on_tensor, key=lambda n: prod(graph.tensors[n]))
    return all(a[n].shape == b[n].shape and _sum(a[n], graph.tensors[n]) == _sum(b[n], graph.tensors[n]) for n in names)


def unequal(graph: NeuronGraph, a: Mapping[str, Tensor], b: Mapping[str, Tensor], element: Element) -> Iterator[str]:
    """Tensors of B that are not A's in the order of `element`, looked for as they are asked for."""
    return (name for name in graph.on_tensor if not _equal(graph, name, a[name], b[name], element))


def copy_order(graph: NeuronGraph, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Element | None:
    """The group element that makes B equal to A; None where B is no permuted copy, or none was found in time.

    Args:
        a, b: tensors by name, of real numbers."""
    if not graph.spaces:
        return None
    search = _Search(graph, a, b)
    try:
        return search.element()
    except _Spent:
        return None


class _Search:
    def __init__(self, graph: NeuronGraph, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
        self.graph, self.states = graph, (a, b)
        self.left = max(2 * PASSES * sum(prod(graph.tensors[n]) for n in graph.on_tensor), LEAST_WORK)
        self.children = {s.id: graph.children(s) for s in graph.spaces}
        self.ranks = {s.id: torch.from_numpy(block_ranks(s.block_parents)) for s in graph.spaces if s.parents}

    def element(self) -> Element | None:
        try:
            start = self._refined(self._start(), [s.id for s in self.graph.spaces], strict=False)
        except _NoCopy:
            return None
        if not all(_told_apart(start, s.id) for s in self.graph.spaces) and not same_numbers(self.graph, *self.states):
            return None
        tried = [iter([start])]
        while tried:
            maybe = next(tried[-1], None)
            if maybe is None:
                tried.pop()
            elif (tied := next((s for s in self.graph.spaces if not _told_apart(maybe, s.id)), None)) is not None:
                tried.append(self._choices(maybe, tied))
            elif (found := self._proven(maybe)) is not None:
                return found
        return None

    def _start(self) -> Colours:
        """Blocks that lie in no others stay where they are; all else is alike."""
        one = {
            s.id: torch.zeros(s.size, dtype=torch.int64) if s.parents else torch.arange(s.size) // s.members
            for s in self.graph.spaces
        }
        return one, dict(one)

    def _choices(self, colours: Colours, space: Space) -> Iterator[Colours]:
        """Ways to tell apart members of one colour, its parents' members being told apart, that lead to no
        contradiction at once."""
        for chosen in self._chosen(colours, space.id):
            try:
                yield self._refined(chosen, [space.id], strict=True)
            except _NoCopy:
                continue

    def _chosen(self, colours: Colours, space: str) -> Iterator[Colours]:
        mine, theirs = (side[space] for side in colours)
        stay, at = mine == theirs, torch.arange(len(mine))
        marks = [torch.zeros_like(mine), torch.zeros_like(theirs)]
        for mark, side in zip(marks, (mine, theirs), strict=True):
            moved = at[~stay]
            mark[stay] = at[stay]
            mark[moved[side[moved].argsort(stable=True)]] = len(at) + torch.arange(len(moved))
        yield _marked(colours, space, marks[0], marks[1])
        values, counts = mine.unique(return_counts=True)
        counts[counts == 1] = len(mine) + 1
        cell = values[counts.argmin()]
        first = int(at[mine == cell][0])
        for j in sorted(at[theirs == cell].tolist(), key=lambda j: j != first):
            yield _marked(colours, space, (at == first).long(), (at == j).long())

    def _refined(self, colours: Colours, moved: list[str], *, strict: bool) -> Colours:
        """Colours of all spaces after some have split; a new pair.

        Args:
            strict: look for contradictions also where all members are told apart already."""
        now: Colours = (dict(colours[0]), dict(colours[1]))
        split = list(moved)
        due = {a.tensor for k in moved for a in self.graph.by_id[k].axes}
        while split or due:
            if split:
                one = self.graph.by_id[split.pop()]
                found = [(s.id, *self._in_family(now, one, s)) for s in self._family(one)]
            else:
                name = min(due, key=lambda n: (prod(self.graph.tensors[n]), n))
                due.discard(name)
                found = self._on_tensor(now, name, strict)
            for k, mine, theirs in found:
                if _deepened(now, k, mine, theirs):
                    split.append(k)
                    due |= {a.tensor for a in self.graph.by_id[k].axes}
        return now

    def _family(self, space: Space) -> list[Space]:
        return [*self.children[space.id], *(self.graph.by_id[p] for p in space.parents)]

    def _in_family(self, colours: Colours, moved: Space, space: Space) -> tuple[Tensor, Tensor]:
        """What members of a space see of one that they lie in, or that lies in them."""
        mine, theirs = (self._seen(side[moved.id], moved, space) for side in colours)
        return mine, theirs

    def _seen(self, colour: Tensor, moved: Space, space: Space) -> Tensor:
        if moved.id in space.parents:
            column = torch.from_numpy(space.block_parents[:, space.parents.index(moved.id)])
            blocks = _mixed(colour[column] + _mixed(self.ranks[space.id]))
            return blocks.repeat_interleave(space.members)
        inside = _mixed(colour).reshape(moved.blocks, -1).sum(1)
        column = torch.from_numpy(moved.block_parents[:, moved.parents.index(space.id)])
        seen = torch.zeros(space.size, dtype=torch.int64)
        return seen.index_add_(0, column, _mixed(inside + _mixed(self.ranks[moved.id])))

    def _on_tensor(self, colours: Colours, name: str, strict: bool) -> list[tuple[str, Tensor, Tensor]]:
        """What the members of all spaces on a tensor see of it."""
        on = [(s, a) for s, a in self.graph.on_tensor[name] if strict or not _told_apart(colours, s.id)]
        if not on:
            return []
        self.left -= 2 * max(prod(self.graph.tensors[name]), LEAST_STEP)
        if self.left < 0:
            raise _Spent
        sums = [self._sums(side, name, k, sorted({a.axis for _, a in on})) for k, side in enumerate(colours)]
        return [(s.id, _at(sums[0][a.axis], s, a), _at(sums[1][a.axis], s, a)) for s, a in on]

    def _sums(self, colour: Mapping[str, Tensor], name: str, which: int, axes: list[int]) -> dict[int, Tensor]:
        """Axis -> hash of what stands at every position of it, by the colours of the other axes' positions."""
        shape = self.graph.tensors[name]
        places = [self._places(colour, name, d).reshape(-1, *[1] * (len(shape) - d - 1)) | 1 for d in range(len(shape))]
        sums = {d: torch.zeros(shape[d], dtype=torch.int64) for d in axes}
        for part, hashed in _pieces(self.states[which][name], shape):
            for d in axes:
                total = hashed
                for e in reversed(range(len(shape))):
                    if e != d:
                        total = (total * (places[e] if e else places[e][part])).sum(e, keepdim=True)
                sums[d][part if d == 0 else slice(None)] += total.reshape(-1)
        return sums

    def _places(self, colour: Mapping[str, Tensor], name: str, axis: int) -> Tensor:
        """Colours of an axis's positions: that of the member and which of its positions it is; what is fixed is told
        apart by where it lies."""
        out = _mixed(torch.arange(self.graph.tensors[name][axis]))
        for s, a in self.graph.on_tensor[name]:
            if a.axis == axis:
                rank = torch.arange(a.positions.shape[1])
                out[torch.from_numpy(a.positions)] = _mixed(
                    colour[s.id][torch.from_numpy(a.members)][:, None] + _mixed(-1 - rank)
                )
        return out

    def _proven(self, colours: Colours) -> Element | None:
        element: Element = {}
        for s in self.graph.spaces:
            mine, theirs = (side[s.id].argsort().numpy() for side in colours)
            element[s.id] = np.empty(s.size, np.int64)
            element[s.id][mine] = theirs
        self.left -= sum(prod(self.graph.tensors[n]) for n in self.graph.on_tensor)
        if self.left < 0:
            raise _Spent
        if not self.graph.contains(element):
            return None
        return None if any(unequal(self.graph, *self.states, element)) else element


def _at(sums: Tensor, space: Space, axis: AxisMap) -> Tensor:
    """What each member sees at its positions on an axis; nothing for those that are not on it."""
    where = torch.from_numpy(axis.positions)
    seen = torch.zeros(space.size, dtype=torch.int64)
    seen[torch.from_numpy(axis.members)] = _mixed(sums[where] + _mixed(torch.arange(where.shape[1]))).sum(1)
    return seen


def _deepened(colours: Colours, space: str, mine: Tensor, theirs: Tensor) -> bool:
    """Whether what members see splits their colours; these are replaced then."""
    old = colours[0][space]
    new = [_mixed(side[space] + _mixed(seen)) for side, seen in zip(colours, (mine, theirs), strict=True)]
    if not torch.equal(new[0].sort().values, new[1].sort().values):
        raise _NoCopy
    if len(new[0].unique()) == len(old.unique()):
        return False
    colours[0][space], colours[1][space] = new
    return True


def _marked(colours: Colours, space: str, mine: Tensor, theirs: Tensor) -> Colours:
    """Members told apart by marks; the same colour for the same mark."""
    made: Colours = (dict(colours[0]), dict(colours[1]))
    for side, mark in zip(made, (mine, theirs), strict=True):
        side[space] = _mixed(side[space] + _mixed(mark))
    return made


def _told_apart(colours: Colours, space: str) -> bool:
    return len(colours[0][space].unique()) == len(colours[0][space])


def _mixed(x: Tensor) -> Tensor:
    """A hash of every number, int64."""
    x = (x + ODD) * ODDER
    x ^= x >> 32
    x *= ODD
    return x.bitwise_xor_(x >> 29)


def _pieces(value: Tensor, shape: tuple[int, ...]) -> Iterator[tuple[slice, Tensor]]:
    """Hashes of a tensor's numbers, some positions of the first dimension at a time."""
    for part in _parts(shape):
        # all formats embed in float64; 0 is added as −0 is 0
        piece = value.detach().narrow(0, part.start, part.stop - part.start) if shape else value.detach()
        bits = (piece.cpu().double() + 0.0).contiguous().view(torch.int64)
        bits.mul_(ODDER)
        bits ^= bits >> 32
        yield part, bits.mul_(ODD)


def _parts(shape: tuple[int, ...]) -> list[slice]:
    if not shape:
        return [slice(0, 1)]
    step = max(PIECE * shape[0] // max(prod(shape), 1), 1)
    return [slice(i, min(i + step, shape[0])) for i in range(0, shape[0], step)]


def _sum(value: Tensor, shape: tuple[int, ...]) -> int:
    """A hash of a tensor's numbers, whatever their order."""
    return int(sum((hashed.sum() for _, hashed in _pieces(value, shape)), torch.zeros((), dtype=torch.int64)))


def _equal(graph: NeuronGraph, name: str, a: Tensor, b: Tensor, element: Element) -> bool:
    shape = graph.tensors[name]
    order = {d: graph.gather_index(name, d, element) for d in range(len(shape))}
    index = {d: torch.from_numpy(i) for d, i in order.items() if i is not None}
    for part in _parts(shape):
        x, y = (v.detach() for v in (a, b))
        if shape:
            x = x.narrow(0, part.start, part.stop - part.start)
            first = index.get(0)
            y = y[part] if first is None else y.index_select(0, first[part].to(y.device))
        for d, i in index.items():
            y = y.index_select(d, i.to(y.device)) if d else y
        if not torch.equal(x.cpu().double(), y.cpu().double()):
            return False
    return True
