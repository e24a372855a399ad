"""Tensors that are formed piece by piece, so that none is ever whole in memory but those that lie in files.

A method that needs a norm or a quantile of the whole tensor reads it once more in pieces before it gives the first
piece of its result. What a piece holds depends on the elements at its place (and on such totals) alone, so that the
size of the pieces is no part of any result.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Union

import torch
from torch import Tensor

CHUNK = 1 << 16
"""Elements of a piece: few enough for the cache, so many that calling torch costs less than what it does."""
HALF = CHUNK // 2
"""Elements of a piece where a dozen buffers of its size are held at once, or numbers of twice the size."""
_alone = threading.local()


@dataclass(frozen=True)
class Pieces:
    """A tensor that is formed when it is read.

    Attributes:
        shape: of the whole.
        dtype: of the whole.
        parts: gives it flat, in row-major order.
    """

    shape: torch.Size
    dtype: torch.dtype
    parts: Callable[[], Iterator[Tensor]]

    def __iter__(self) -> Iterator[Tensor]:
        return self.parts()

    def whole(self) -> Tensor:
        """All of it in memory."""
        out = torch.empty(self.shape, dtype=self.dtype)
        flat, at = out.view(-1), 0
        for part in self:
            flat[at : at + len(part)] = part
            at += len(part)
        return out


Formed = Union[Tensor, Pieces]
"""What a method returns."""


def whole(formed: Formed) -> Tensor:
    """The tensor itself."""
    return formed.whole() if isinstance(formed, Pieces) else formed


def places(size: int, step: int | None = None) -> Iterator[slice]:
    """Where the pieces of a flat tensor lie. While they are gone through, torch works in one thread.

    Args:
        size: its elements.
        step: those of a piece; None: `CHUNK`.
    """
    step = CHUNK if step is None else step
    with one_thread():
        for start in range(0, size, step):
            yield slice(start, min(start + step, size))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch in this thread alone: to wake others for a piece takes longer than the piece (five times the CPU time)."""
    depth = getattr(_alone, "depth", 0)
    if not depth:
        _alone.before = torch.get_num_threads()
        torch.set_num_threads(1)
    _alone.depth = depth + 1
    try:
        yield
    finally:
        _alone.depth -= 1  # whichever of several ends last
        if not _alone.depth:
            torch.set_num_threads(_alone.before)


def rows_at_once(width: int) -> int:
    """How many rows of this width make a piece; one at least."""
    return max(1, CHUNK // max(width, 1))


def in_pieces(
    tensors: Sequence[Tensor],
    dtype: torch.dtype,
    merge: Callable[[slice, list[Tensor]], Tensor],
    step: int | None = None,
) -> Pieces:
    """A function of the elements at each place, applied piece by piece.

    Args:
        tensors: of equal shape.
        dtype: of the result.
        merge: (place of the piece, the tensors' pieces, flat) -> that piece of the result.
        step: elements of a piece; None: `CHUNK`.
    """
    flat = [t.reshape(-1) for t in tensors]

    def parts() -> Iterator[Tensor]:
        for place in places(len(flat[0]), step):
            yield merge(place, [t[place] for t in flat]).to(dtype)

    return Pieces(tensors[0].shape, dtype, parts)


def as_it_is(tensor: Tensor, dtype: torch.dtype) -> Pieces:
    """A tensor in another number format."""
    return in_pieces([tensor], dtype, lambda _, pieces: pieces[0])


def added_up(
    tensors: Sequence[Tensor], sums: Callable[[slice, list[Tensor]], list[Tensor]], step: int | None = None
) -> Tensor:
    """Totals over whole tensors, added up in float64 piece by piece.

    Args:
        tensors: of equal shape.
        sums: (place, pieces) -> 0-dimensional sums over that piece.

    Returns:
        float64, one total per sum.
    """
    flat = [t.reshape(-1) for t in tensors]
    total = torch.zeros(0, dtype=torch.float64)
    for place in places(len(flat[0]), step):
        # Added up at once: small results that stay between large ones leave holes that nothing else fits into.
        found = torch.stack(sums(place, [t[place] for t in flat])).to(torch.float64)
        total = total.add_(found) if len(total) else found
    return total
