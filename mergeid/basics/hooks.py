"""Hooks on modules that are there for one piece of work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.hooks import RemovableHandle


@contextmanager
def listening(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Without gradients, and with these hooks, which are gone afterwards."""
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
