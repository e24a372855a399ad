"""Quantiles of tensors that are never whole in memory: the exact elements of the sorted order, from histograms.

The bits of a float, read as a whole number, rise with it. So the elements are counted by their first 16 bits (15, where
none is negative); where too many share those of the element that is sought, they are counted by the next 16, else they
are picked out and ordered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Keys = NDArray[Any]

GATHER = 1 << 16
"""Most elements that are picked out and ordered."""
DIGIT = 16


@dataclass
class _Sought:
    """One place of the order: of the elements whose first `bits` are `prefix`, `count` in number, the `rank`-th."""

    rank: int
    bits: int = 0
    prefix: int = 0
    count: int = 0

    @property
    def key(self) -> tuple[int, int]:
        return self.bits, self.prefix


def at_places(
    values: Callable[[], Iterable[Tensor]], ranks: Sequence[int], dtype: torch.dtype, *, signed: bool = False
) -> list[float]:
    """The elements at these places of the ascending order of all, as sorting would give them.

    Args:
        values: gives all elements in flat pieces, the same ones whenever it is called (once for every 16 bits at most).
            NaN counts as larger than infinity.
        ranks: places, from 0.
        dtype: of the pieces, float32 or float64.
        signed: whether some may be negative (-0.0 too).
    """
    width = 8 * dtype.itemsize
    sought = [_Sought(rank) for rank in ranks]
    while unsure := [s for s in sought if s.bits < width and (s.bits == 0 or s.count > GATHER)]:
        counts = {s.key: np.zeros(1 << (DIGIT if s.bits or signed else DIGIT - 1), np.int64) for s in unsure}
        for piece in values():
            keys = _keys(piece, signed)
            for (bits, prefix), count in counts.items():
                digits = (_with(keys, width, bits, prefix) >> (width - bits - DIGIT)).astype(np.uint16)
                count += np.bincount(digits, minlength=len(count))
        for s in unsure:
            upto = np.cumsum(counts[s.key])
            digit = int(np.searchsorted(upto, s.rank, side="right"))
            s.rank, s.count = s.rank - int(upto[digit - 1] if digit else 0), int(counts[s.key][digit])
            s.bits, s.prefix = s.bits + DIGIT, s.prefix << DIGIT | digit
    kind = np.uint32 if width == 32 else np.uint64
    picked = {s.key: np.empty(s.count, kind) for s in sought if s.bits < width}
    filled = dict.fromkeys(picked, 0)
    for piece in values() if picked else ():
        keys = _keys(piece, signed)
        for (bits, prefix), own in picked.items():
            part, at = _with(keys, width, bits, prefix), filled[bits, prefix]
            own[at : at + len(part)] = part
            filled[bits, prefix] = at + len(part)
    for s in sought:
        if s.key in picked:
            picked[s.key].partition(s.rank)  # in place: a copy is as large
            s.prefix = int(picked[s.key][s.rank])
    return [_float(s.prefix, width, signed) for s in sought]


def _keys(piece: Tensor, signed: bool) -> Keys:
    """Whole numbers without a sign that rise with the floats."""
    numbers = piece.numpy()
    kind, width = (np.uint32, 32) if numbers.itemsize == 4 else (np.uint64, 64)
    bits: Keys = numbers.view(kind)
    if not signed:
        return bits
    top = kind(1 << (width - 1))
    return np.where(bits & top, ~bits, bits | top)


def _with(keys: Keys, width: int, bits: int, prefix: int) -> Keys:
    """Those whose first bits are these."""
    return keys[keys >> keys.dtype.type(width - bits) == prefix] if bits else keys


def _float(number: int, width: int, signed: bool) -> float:
    kind, real = (np.uint32, np.float32) if width == 32 else (np.uint64, np.float64)
    top = 1 << (width - 1)
    if signed:
        number = number ^ top if number & top else number ^ ((1 << width) - 1)
    return float(np.array([number], kind).view(real)[0])
