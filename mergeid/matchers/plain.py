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

from collections.abc import Collection, Iterator, Mapping, Sequence
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
    pairs: their inner products, float64 [size].
    before: those of the order that was asked about.
    """

    perm: np.ndarray
    pairs: np.ndarray
    before: np.ndarray

    @property
    def gain(self) -> float:
        return float((self.pairs - self.before).sum())

    @property
    def size(self) -> float:
        """The largest inner product that took part."""
        return float(max(np.abs(self.pairs).max(), np.abs(self.before).max()))


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
    """Whether a space is one block with no other around it, whole on every axis, on no tensor twice, and so large that
    products of all pairs are dear."""
    if space.parents or space.blocks != 1 or space.size < LEAST_SIZE:
        return False
    axes = similarity.axes(space, known)
    once = len({a.tensor for a in axes}) == len(axes)
    entries = sum(prod(similarity.graph.tensors[a.tensor]) // space.size for a in axes)
    return once and entries >= LEAST_ENTRIES and all(len(a.members) == space.size for a in axes)


def plain_match(
    similarity: WeightSimilarity,
    space: Space,
    element: Mapping[str, np.ndarray],
    known: Collection[str] | None = None,
) -> PlainMatch | None:
    """The best permutation of one space, all others as in `element`; None where it is not plain to see.

    Args:
        space: one that is `worth_looking` at; no others lie in it.
        known: as in `WeightSimilarity.products`."""
    axes, now = similarity.axes(space, known), element[space.id]
    seen = _sketched(similarity, space, axes, element)
    found = _best_columns(seen)
    if len(torch.unique(found)) < space.size:
        return None
    perm = now[found.cpu().numpy()]
    stays = np.array_equal(perm, now)
    pairs = seen.pairs if stays else similarity.paired(axes, perm, {**element, space.id: perm})
    if not _proven(seen, found, pairs):
        return None
    return PlainMatch(perm, pairs.cpu().numpy(), seen.pairs.cpu().numpy())


@dataclass(frozen=True)
class _Seen:
    """Attributes:
    sketches: A's and B's members, float32 [2, size, buckets], B's in the order that was asked about.
    squares: their squared norms, float64 [2, size].
    pairs: exact inner products of A's members with B's in that order, float64 [size].
    """

    sketches: Tensor
    squares: Tensor
    pairs: Tensor


def _members(
    similarity: WeightSimilarity, axis: AxisMap, element: Mapping[str, np.ndarray], space: Space
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(A's members, B's that the element puts in their places, which entries), float32 [size, entries]."""
    place = np.argsort(axis.members)
    mine, theirs = torch.from_numpy(place), torch.from_numpy(place[element[space.id]])
    for x, y, places in similarity.pairs(axis, element):
        yield _taken(x, mine), _taken(y, theirs), places


def _taken(value: Tensor, order: Tensor) -> Tensor:
    """Rows in another order; no copy where it is the same."""
    return value if bool((order == torch.arange(len(order))).all()) else value[order.to(value.device)]


def _sketched(
    similarity: WeightSimilarity, space: Space, axes: list[AxisMap], element: Mapping[str, np.ndarray]
) -> _Seen:
    device = similarity.device
    sketches = torch.zeros(2, space.size, BUCKETS, device=device)
    squares, pairs = (torch.zeros(*n, space.size, dtype=torch.float64, device=device) for n in ((2,), ()))
    generator = Generator().manual_seed(space.size)
    for axis in axes:
        factor = similarity.factor[axis.tensor]
        for x, y, places in _members(similarity, axis, element, space):
            bucket = torch.randint(BUCKETS, (len(places),), generator=generator).to(device)
            sign = ((torch.randint(2, (len(places),), generator=generator) * 2 - 1) * factor).to(device, torch.float32)
            for k, part in enumerate((x, y)):
                squares[k] += part.square().sum(1, dtype=torch.float64) * factor**2
                sketches[k].index_add_(1, bucket, part * sign)
            pairs += (x * y).sum(1, dtype=torch.float64) * factor**2
    return _Seen(sketches, squares, pairs)


def _best_columns(seen: _Seen) -> Tensor:
    """For every member of A the one of B that is nearest."""
    (a, b), half = seen.sketches, (seen.squares[1] / 2).float()
    return torch.cat([(a[i : i + ROWS] @ b.T - half).argmax(1) for i in range(0, len(a), ROWS)])


def _proven(seen: _Seen, found: Tensor, pairs: Tensor) -> bool:
    """Whether no assignment is better than this one, with these exact inner products."""
    (a, b), norms, half = seen.sketches, seen.squares.sqrt().float(), seen.squares[1] / 2
    reach = SIGMAS * sqrt(2 / BUCKETS)
    most = pairs - half[found]
    for i in range(0, len(a), ROWS):
        part = slice(i, min(i + ROWS, len(a)))
        above = (a[part] @ b.T) + reach * norms[0, part, None] * norms[1][None] - half.float()
        above.scatter_(1, found[part, None], -torch.inf)
        if bool((above.amax(1) > most[part]).any()):
            return False
    return True
