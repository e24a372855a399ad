"""Whether two checkpoints' neurons lie in the same places, seen from the weights alone, at the speed of the disk.

Fine-tunes of one base keep every neuron where it was. Then each row of B, on every axis of every tensor, is far nearer
to the row at its own place in A than to others, and no order but the given one brings them nearer. Networks that were
trained apart show nothing of the kind: there a row's own place is as good as any other. So is it for neurons that were
moved, whose rows then lie in wrong places on some axis.

What is compared, for every axis with two positions or more of every tensor with two such axes (vectors alone tell no
neuron from another):

- the squared distance of every row to its own place, over all its elements, against its length;
- on a window of `WINDOW` of its elements, its distance to its own place against those to `OTHERS` rows, drawn by a
  seed. A moved row differs from its place there as much as from any other.

Everything is computed in float32 and added up in float64, tile by tile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mergeid.combine.by_numpy import widen
from mergeid.io.dtypes import FLOATS, NUMPY_KINDS
from mergeid.io.tensors import TensorSource

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

OTHERS = 16
"""Rows of A that every row of B is held against, besides its own place."""
WINDOW = 128
"""Elements of a row that take part in that."""
NEARER = 0.25
"""Own squared distance over the least of the others: half their distance, from which on a row fits its place."""
NEXT_TO_NOTHING = 0.01
"""Own squared distance over the mean of others: a tenth of the usual distance, where it does not matter which row it is
(rows that training never touched are alike)."""
ALIKE = 0.5
"""Own squared distance over the row's own: a cosine of 3/4, for rows of equal length."""
TILE = 1 << 16
"""Elements that are widened at once."""
MULTIPLE = 0.05
"""Squared distance of a row to the nearest multiple of that at its own place, over the distance to its own place, up to
which it is a multiple."""
LEAST = 8
"""Elements by which a row can be seen to be one."""
_GIVE_UP = 0.5
"""Share of rows astray from which on the rest is not read: these are two networks."""


@dataclass(frozen=True)
class AxisFit:
    """The rows along one axis of one tensor.

    Attributes:
        tensor: its name.
        axis: its number.
        rows: how many there are.
        astray: those that do not fit their own place.
        ratio: the largest ratio of the distance to the own place to that to the nearest other, of the rows that fit.
        rescaled: whether most rows are multiples of those at their own places, by factors that differ.
    """

    tensor: str
    axis: int
    rows: int
    astray: tuple[int, ...] = ()
    ratio: float = 0.0
    rescaled: bool = False


@dataclass(frozen=True)
class InPlace:
    """What two checkpoints' rows say of the places of their neurons.

    Attributes:
        axes: every axis that was compared.
        whole: whether all were; else most rows were astray, and the rest was not read, or a tensor cannot tell.
    """

    axes: tuple[AxisFit, ...]
    whole: bool

    @property
    def rows(self) -> int:
        return sum(a.rows for a in self.axes)

    @property
    def rescaled(self) -> bool:
        """Whether B looks like another model with its neurons rescaled, on any axis."""
        return any(a.rescaled for a in self.axes)

    @property
    def astray(self) -> dict[tuple[str, int], tuple[int, ...]]:
        """(tensor, axis) -> rows that do not fit their places."""
        return {(a.tensor, a.axis): a.astray for a in self.axes if a.astray}

    @property
    def ratio(self) -> float:
        """Distance to the own place over that to the nearest other, the largest of those rows that fit."""
        return max((a.ratio for a in self.axes), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """As it stands in a record."""
        return {
            "axes": len(self.axes),
            "rows": self.rows,
            "astray": sum(len(rows) for rows in self.astray.values()),
            "others": OTHERS,
            "largest_ratio": round(self.ratio, 4),
        }


def in_place(a: TensorSource, b: TensorSource, names: Sequence[str], seed: int) -> InPlace:
    """Compare two checkpoints of equal shapes.

    Args:
        names: the tensors that will be merged.
        seed: of the windows and of the rows that others are held against.
    """
    found: list[AxisFit] = []
    compared = [n for n in names if sum(d > 1 for d in a.table[n].shape) > 1]
    if not compared or not all(c.table[n].dtype in FLOATS for c in (a, b) for n in compared):
        return InPlace((), False)

    def look(name: str) -> list[AxisFit]:
        seen = _axes(name, _Stored.of(a, name), _Stored.of(b, name), seed)
        for checkpoint in (a, b):
            checkpoint.release(name)
        return seen

    with ThreadPoolExecutor(2) as pool:
        pending = [pool.submit(look, name) for name in compared]
        for work in pending:
            found += work.result()
            if sum(len(f.astray) for f in found) > _GIVE_UP * sum(f.rows for f in found):
                for other in pending:
                    other.cancel()
                return InPlace(tuple(found), False)
    return InPlace(tuple(found), True)


@dataclass(frozen=True)
class _Stored:
    """A tensor's numbers as they lie, [first axis, all others]."""

    numbers: Array
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, checkpoint: TensorSource, name: str) -> _Stored:
        info = checkpoint.table[name]
        if checkpoint.mapped:
            flat = np.frombuffer(checkpoint.raw(name), NUMPY_KINDS[info.dtype])
        else:
            import torch

            tensor = checkpoint.tensor(name).contiguous()
            flat = (tensor.view(torch.int16) if info.dtype == "BF16" else tensor).reshape(-1).numpy()
            flat = flat.view(NUMPY_KINDS[info.dtype])
        return cls(flat.reshape(info.shape[0], -1), info.dtype, info.shape)

    def part(self, rows: slice | Array, columns: slice = slice(None)) -> Array:
        """float32 [rows, columns]."""
        part = np.ascontiguousarray(self.numbers[rows, columns])
        return widen(part.reshape(-1), self.dtype, "F32").reshape(part.shape)


def _axes(name: str, a: _Stored, b: _Stored, seed: int) -> list[AxisFit]:
    with np.errstate(all="ignore"):  # what is no number fits nowhere, and is named where it is read next
        totals = _totals(a, b)
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        draw = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        return [_judged(name, k, totals[k], _window(a, b, k, draw)) for k, size in enumerate(a.shape) if size > 1]


def _totals(a: _Stored, b: _Stored) -> dict[int, tuple[Array, Array]]:
    """Axis -> (squared distance of every row of B to its own place in A, its squared length), over all elements."""
    sums = {k: np.zeros((2, n)) for k, n in enumerate(a.shape) if n > 1}
    for rows, columns in _tiles(a):
        theirs = b.part(rows, columns)
        apart = a.part(rows, columns)
        apart -= theirs
        for which, part in enumerate((apart, theirs)):
            part *= part
            if 0 in sums:
                sums[0][which, rows] += part @ np.ones(part.shape[1], np.float32)
            if len(a.shape) == 2 and 1 in sums:
                sums[1][which, columns] += np.ones(len(part), np.float32) @ part
            elif len(a.shape) > 2:
                block = part.reshape(-1, *a.shape[1:])
                for k in (k for k in sums if k):
                    sums[k][which] += block.sum(tuple(d for d in range(block.ndim) if d != k), dtype=np.float64)
    return {k: (s[0], s[1]) for k, s in sums.items()}


def _tiles(stored: _Stored) -> Iterator[tuple[slice, slice]]:
    """Blocks of rows and columns of about `TILE` elements; of tensors with more axes whole rows."""
    rows, width = stored.numbers.shape
    wide = width if len(stored.shape) > 2 else min(width, TILE // 8)
    high = max(1, TILE // max(wide, 1))
    for top in range(0, rows, high):
        for left in range(0, width, wide):
            yield slice(top, min(top + high, rows)), slice(left, min(left + wide, width))


def _window(a: _Stored, b: _Stored, axis: int, draw: np.random.Generator) -> tuple[Array, Array, float, bool]:
    """(Squared distance of every row to its own place, the least to other rows, their mean), on a part of the row, and
    whether B's rows are multiples of A's."""
    count = a.shape[axis]
    sample = np.sort(draw.choice(count, min(OTHERS, count), replace=False))
    if axis == 0:
        width = a.numbers.shape[1]
        left = int(draw.integers(0, max(width - WINDOW, 0) + 1))
        columns = slice(left, left + WINDOW)
        others = a.part(sample, columns)
        blocks = ((rows, (a.part(rows, columns), b.part(rows, columns))) for rows in _rows(count, others.shape[1]))
    else:
        beside = a.numbers.shape[1] // count  # elements that one row along the first axis adds
        high = min(a.shape[0], -(-WINDOW // beside))
        top = int(draw.integers(0, a.shape[0] - high + 1))
        whole = [_along(x, slice(top, top + high), axis) for x in (a, b)]
        others = whole[0][sample]
        blocks = ((rows, (whole[0][rows], whole[1][rows])) for rows in _rows(count, others.shape[1]))
    own, nearest, total = np.empty(count), np.empty(count), 0.0
    factors, rest = np.empty(count), np.empty(count)
    lengths = (others * others).sum(1)
    for rows, (ours, theirs) in blocks:
        apart = ours - theirs
        own[rows] = np.einsum("ij,ij->i", apart, apart)
        squares = np.einsum("ij,ij->i", theirs, theirs)
        factors[rows] = np.einsum("ij,ij->i", apart, theirs) / squares + 1
        rest[rows] = own[rows] - (factors[rows] - 1) ** 2 * squares
        far = squares[:, None] + lengths - 2 * (theirs @ others.T)
        np.maximum(far, 0, out=far)
        itself = np.arange(rows.start, rows.stop)[:, None] == sample
        total += float(far.sum(where=~itself, dtype=np.float64))
        nearest[rows] = np.where(itself, np.inf, far).min(1)
    multiple = (own > 0) & (rest <= MULTIPLE * own)
    steps = factors[multiple] - 1
    rescaled = len(steps) > count / 2 and others.shape[1] >= LEAST and bool(steps.std() > abs(steps.mean()) / 10)
    return own, nearest, total / (count * len(sample) - len(sample)), rescaled


def _rows(count: int, width: int) -> Iterator[slice]:
    high = max(1, TILE // max(width, 1))
    return (slice(top, min(top + high, count)) for top in range(0, count, high))


def _along(stored: _Stored, rows: slice, axis: int) -> Array:
    """float32 [positions of the axis, elements] of some rows along the first axis."""
    part = stored.part(rows)
    block = part.reshape(len(part), *stored.shape[1:])
    return np.ascontiguousarray(np.moveaxis(block, axis, 0)).reshape(stored.shape[axis], -1)


def _judged(name: str, axis: int, totals: tuple[Array, Array], window: tuple[Array, Array, float, bool]) -> AxisFit:
    apart, lengths = totals
    own, nearest, usual, rescaled = window
    fits = (own <= NEARER * nearest) | (own <= NEXT_TO_NOTHING * usual)
    fits &= (apart <= ALIKE * lengths) | (apart <= NEXT_TO_NOTHING * lengths.mean())
    clear = fits & (nearest > 0) & (own <= NEARER * nearest)
    ratio = float(np.sqrt((own[clear] / nearest[clear]).max())) if clear.any() else 0.0
    return AxisFit(name, axis, len(own), tuple(np.flatnonzero(~fits).tolist()), ratio, rescaled)
