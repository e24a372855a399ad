"""Keys of rows of integers, and what can be said of equal ones: their number, their sums, their order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.sparse import coo_matrix

FACTORS = [np.uint64(f | 1) for f in (0x9FB21C651E98DF25, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F, 0xE7037ED1A0B428DB)]
PIECE = 1 << 16


def pieces(length: int) -> Iterator[slice]:
    """Slices of long arrays that stay in the processor's cache while they are worked on."""
    for start in range(0, length, PIECE):
        yield slice(start, start + PIECE)


def mix(x: np.ndarray, salt: int) -> np.ndarray:
    """splitmix64: a fixed, well-spread 64-bit hash."""
    out = x.astype(np.uint64)
    for piece in pieces(len(out)):
        z = out[piece]
        z += np.uint64((0x9E3779B97F4A7C15 * (salt + 1)) & 0xFFFFFFFFFFFFFFFF)
        z ^= z >> np.uint64(30)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
        z *= np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return out


def key(*columns: np.ndarray) -> np.ndarray:
    """One 64-bit hash per row: a linear form with large odd factors, mixed."""
    out = np.empty(len(columns[0]), np.uint64)
    for piece in pieces(len(out)):
        form = columns[0][piece].astype(np.uint64) * FACTORS[0]
        for column, factor in zip(columns[1:], FACTORS[1:], strict=False):
            form += column[piece].astype(np.uint64) * factor
        out[piece] = mix(form, 20)
    return out


def number(keys: np.ndarray) -> np.ndarray:
    """Equal keys get equal numbers from 0."""
    return np.unique(keys, return_inverse=True)[1].reshape(-1)


def how_many(keys: np.ndarray) -> int:
    """Different ones: by a sort, many times faster than np.unique, which hashes."""
    return int(np.count_nonzero(np.diff(np.sort(keys)))) + min(len(keys), 1)


def sum_by(index: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """Sum of hashes by index modulo 2⁶⁴: a hash of the multiset."""
    out = np.zeros(n, np.uint64)
    np.add.at(out, index, values)
    return out


def distinct_pairs(a: np.ndarray, b: np.ndarray, count: int) -> np.ndarray:
    """The pairs of numbers below `count`, sorted, each once: [pairs, 2]."""
    code = np.sort(a * count + b)
    code = code[np.diff(code, prepend=-1) > 0]
    return np.stack(np.divmod(code, count), 1)


def distinct(numbers: np.ndarray, count: int) -> np.ndarray:
    """Those below `count` that occur, sorted."""
    there = np.zeros(count, bool)
    there[numbers] = True
    return np.flatnonzero(there)


def in_order(numbers: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(places sorted by their number below `count`, equal ones in order; where each number starts: [count + 1]).

    A counting sort."""
    n = len(numbers)
    sorted_ = coo_matrix((np.ones(n, np.int8), (numbers, np.arange(n))), shape=(count, max(n, 1))).tocsr()
    return sorted_.indices, sorted_.indptr


def spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The ranges of these lengths from these starts on, one after the other."""
    answer: np.ndarray = np.arange(lengths.sum()) + np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
    return answer


def ranks(numbers: np.ndarray, count: int) -> np.ndarray:
    """The place of every entry among those with its number below `count`."""
    order, start = in_order(numbers, count)
    rank = np.empty(len(numbers), np.int64)
    rank[order] = np.arange(len(numbers)) - np.repeat(start[:-1], np.diff(start))
    return rank


def first_of_pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Places of the pairs' first occurrences, in order."""
    return np.sort(np.unique(a * (int(b.max(initial=0)) + 1) + b, return_index=True)[1])
