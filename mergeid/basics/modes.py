"""Modules that a caller gave stay in the mode that they came in."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def modes_put_back(given: Iterable[Any]) -> Iterator[None]:
    """Every training flag as it was, of modules among these values or in a list, tuple or mapping among them."""
    flags = [(module, module.training) for top in _modules(given) for module in top.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            if module.training != training:
                module.training = training


def _modules(given: Iterable[Any]) -> list[nn.Module]:
    if "torch" not in sys.modules:  # then there are none
        return []
    from torch import nn

    found = []
    for value in given:
        inside = (
            value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else [value]
        )
        found += [v for v in inside if isinstance(v, nn.Module)]
    return found
