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


def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
