"""Permutations that are plain to see: found without the matrix of all inner products, and proven to be the best.

The members of a space are vectors with as many entries as its tensors hold beside it; all inner products of n of them
with d entries take n² d steps. A count sketch (Charikar et al. 2002; Weinberger et al. 2009, "Feature hashing for large
scale multitask learning") adds the entries up in `BUCKETS` sums with random signs, which keeps every inner product but
for a random error of standard deviation below √(2 / k) |x| |y|. Where one model is a permuted copy of the other, or
both come from one base, that is enough to see who belongs to whom.

The proof is that of linear programming: with v_j = |y_j|² / 2 and exact inner products d_i of the pairs found, no
assignment is better where ⟨x_i, y_j⟩ ≤ d_i + v_j − v_π(i) for all i and j. It is asked of the sketched inner products
with `SIGMAS` standard deviations added. What is not proven is matched in full.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt

import numpy as np
import torch
from torch import Generator, Tensor

from mergeid.matchers.inner_products import WeightSimilarity
from mergeid.neuron_graph.neuron_graph import AxisMap, Space

BUCKETS = 512
SIGMAS = 7.0
"""Errors beyond which an inner product is taken to lie nowhere: less than one in 10^11 does."""
LEAST_SIZE, LEAST_ENTRIES = 1024, 4 * BUCKETS
"""Smaller spaces, and members with fewer entries, are multiplied out: that costs no more."""
ROWS = 512
"""Members of A that are compared with all of B's at once."""


@dataclass(frozen=True)
class PlainMatch:
    """Attributes:
    perm: B's member for every one of A's.
    gain: by how much its inner products exceed those of the order that was asked about.
    size: the largest inner product that took part.
    """

    perm: np.ndarray
    gain: float
    size: float


def seen_plainly(
    similarity: WeightSimilarity,
    tree: Sequence[Space],
    element: Mapping[str, np.ndarray],
    known: Collection[str] | None = None,
) -> PlainMatch | None:
    """`plain_match` of a space in which no others lie; None where it is not worth looking."""
    if len(tree) > 1 or not worth_looking(similarity, tree[0], known):
        return None
    return plain_match(similarity, tree[0], element, known)


def worth_looking(similarity: WeightSimilarity, space: Space, known: Collection[str] | None = None) -> bool:
    """Whether a space is one block with no other around it, and so large that products of all pairs are dear."""
    if space.parents or space.blocks != 1 or space.size < LEAST_SIZE:
        return False
    entries = sum(prod(similarity.graph.tensors[a.tensor]) // space.size for a in _axes(similarity, space, known))
    return entries >= LEAST_ENTRIES


def plain_match(
    similarity: WeightSimilarity,
    space: Space,
    element: Mapping[str, np.ndarray],
    known: Collection[str] | None = None,
) -> PlainMatch | None:
    """The best permutation of one space, all others as in `element`; None where it is not plain to see.

    Args:
        space: without others in it or around it, on no two axes of one tensor.
        known: as in `WeightSimilarity.products`."""
    axes = _axes(similarity, space, known)
    sketches, squares = _sketched(similarity, space, axes, element)
    half = squares[1] / 2
    found = _best_columns(sketches, half)
    if len(torch.unique(found)) < space.size:
        return None
    pairs = _paired(similarity, space, axes, element, found)
    if not _proven(sketches, squares, found, pairs):
        return None
    before = torch.from_numpy(np.ascontiguousarray(element[space.id])).to(found.device)
    own = pairs if torch.equal(before, found) else _paired(similarity, space, axes, element, before)
    size = float(torch.maximum(pairs.abs().max(), own.abs().max()))
    return PlainMatch(found.cpu().numpy(), float((pairs - own).sum()), size)


def _axes(similarity: WeightSimilarity, space: Space, known: Collection[str] | None) -> list[AxisMap]:
    if known is None:
        return list(space.axes)
    graph = similarity.graph
    return [a for a in space.axes if all(s.id in known for s, o in graph.on_tensor[a.tensor] if o.axis != a.axis)]


def _sketched(
    similarity: WeightSimilarity, space: Space, axes: list[AxisMap], element: Mapping[str, np.ndarray]
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Sketches of A's and B's members, float32 [size, buckets]; and their squared norms, float64 [2, size]."""
    device = similarity.device
    sums = torch.zeros(2, space.size, BUCKETS, device=device)
    squares = torch.zeros(2, space.size, dtype=torch.float64, device=device)
    generator = Generator().manual_seed(space.size)
    for axis in axes:
        members = torch.from_numpy(axis.members).to(device)
        factor = similarity.factor[axis.tensor]
        for x, y, places in similarity.pairs(axis, element):
            bucket = torch.randint(BUCKETS, (len(places),), generator=generator).to(device)
            sign = ((torch.randint(2, (len(places),), generator=generator) * 2 - 1) * factor).to(device, torch.float32)
            for k, part in enumerate((x, y)):
                squares[k].index_add_(0, members, part.square().sum(1, dtype=torch.float64) * factor**2)
                if len(members) == space.size and torch.equal(members, torch.arange(space.size, device=device)):
                    sums[k].index_add_(1, bucket, part * sign)
                else:
                    added = torch.zeros(len(part), BUCKETS, device=device).index_add_(1, bucket, part * sign)
                    sums[k].index_add_(0, members, added)
    return (sums[0], sums[1]), squares


def _best_columns(sketches: tuple[Tensor, Tensor], half: Tensor) -> Tensor:
    """For every member of A the one of B that is nearest."""
    a, b = sketches
    return torch.cat([(a[i : i + ROWS] @ b.T - half.float()).argmax(1) for i in range(0, len(a), ROWS)])


def _paired(
    similarity: WeightSimilarity,
    space: Space,
    axes: list[AxisMap],
    element: Mapping[str, np.ndarray],
    perm: Tensor,
) -> Tensor:
    """Exact inner products of A's members with B's that a permutation puts in their places, float64 [size]."""
    total = torch.zeros(space.size, dtype=torch.float64, device=similarity.device)
    for axis in axes:
        place = np.full(space.size, -1)
        place[axis.members] = np.arange(len(axis.members))
        theirs = torch.from_numpy(place[perm.cpu().numpy()[axis.members]])
        here = torch.nonzero(theirs >= 0).flatten()  # members that B's partner has no weights beside: nothing to add
        members = torch.from_numpy(axis.members)[here].to(total.device)
        for x, y, _ in similarity.pairs(axis, element):
            found = (x[here.to(x.device)] * y[theirs[here].to(y.device)]).sum(1, dtype=torch.float64)
            total.index_add_(0, members, found * similarity.factor[axis.tensor] ** 2)
    return total


def _proven(sketches: tuple[Tensor, Tensor], squares: Tensor, perm: Tensor, pairs: Tensor) -> bool:
    """Whether no assignment is better than this one."""
    a, b = sketches
    norms = squares.sqrt().float()
    reach = SIGMAS * sqrt(2 / BUCKETS)
    half = squares[1] / 2
    most = pairs - half[perm]
    for i in range(0, len(a), ROWS):
        part = slice(i, min(i + ROWS, len(a)))
        above = (a[part] @ b.T) + reach * norms[0, part, None] * norms[1][None] - half.float()
        above.scatter_(1, perm[part, None], -torch.inf)
        if bool((above.amax(1) > most[part]).any()):
            return False
    return True
