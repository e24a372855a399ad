"""Hooks on modules that are there for one piece of work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


def heard(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that take hooks, by name: all but the scripted ones."""
    return ((name, m) for name, m in model.named_modules() if not isinstance(m, torch.jit.ScriptModule))


@contextmanager
def listening(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Without gradients, and with these hooks, which are gone afterwards."""
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
