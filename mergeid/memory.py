"""Memory that is free inside of the process, given back to the system."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable


def give_back() -> None:
    """To be called where much was freed: glibc keeps freed blocks of up to 32 MB, which most weights are, for the
    process. After a float64 copy of a BERT-base model they are 0.6 GB. Other C libraries keep less; there nothing is
    done."""
    if sys.platform == "linux" and (trim := _trim()) is not None:
        trim(0)


def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
