"""Memory: what is free inside of the process is given back to the system, and how much is looked at at once."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NUMBERS = 1 << 22
"""Logits of one network that are looked at at once: those of a language model are large in float64."""
SMALL_NETWORK = 30_000_000
"""Parameters of a network whose copies, traces and freed blocks are not worth saving."""
BLOCK, M_MMAP_THRESHOLD = 1 << 22, -3
"""Bytes, and glibc's name for the limit."""


def few_rows(*logits: Tensor) -> Iterator[list[Tensor]]:
    """float64 [rows, classes] of logits of one shape [..., classes], `NUMBERS` of each at a time."""
    classes = logits[0].shape[-1]
    step = max(NUMBERS // classes, 1)
    for parts in zip(*(t.reshape(-1, classes).split(step) for t in logits), strict=True):
        yield [p.double() for p in parts]


def give_back() -> None:
    """To be called where much was freed: glibc keeps freed blocks of up to 32 MB, which most weights are, for the
    process. After a float64 copy of a BERT-base model they are 0.6 GB. Other C libraries keep less; there nothing is
    done."""
    if sys.platform == "linux" and (trim := _trim()) is not None:
        trim(0)


def give_back_at_once() -> None:
    """To be called before weights are formed and let go in great number: from now on glibc asks the system for each
    block of more than `BLOCK` bytes and gives it back when it is freed, where it would otherwise raise that limit to
    32 MB and keep what lies between blocks in use. The graph of 1.2 billion parameters takes 0.54 GB with it and 1.25
    GB without, in the same time."""
    if sys.platform == "linux" and (choose := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        choose(M_MMAP_THRESHOLD, BLOCK)


def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
