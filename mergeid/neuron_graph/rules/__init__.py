"""Op rules: how each family of aten operations moves neuron labels.

A rule takes a `Call` and returns the layout of its output (a list for several outputs, None for one that nobody
reads as neurons). One registry; every file of this package registers one family.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from mergeid.neuron_graph.call import Call, Result

Rule = Callable[[Call], Result]

_RULES: dict[str, Rule] = {}
_FAMILIES = (
    "pointwise",
    "movement",
    "memory",
    "joining",
    "indexing",
    "scatter",
    "contraction",
    "distance",
    "matrices",
    "recurrent",
    "normalisation",
    "reduction",
    "backward",
    "spatial",
    "regions",
)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for aten operations (``"mm"`` stands for all overloads of ``aten.mm``), or for those of another
    library (``"torchvision.nms"``). Raises ValueError when one has a rule already."""

    def decorate(function: Rule) -> Rule:
        for name in names:
            key = name if "." in name else f"aten.{name}"
            if key in _RULES:
                raise ValueError(f"{key} has a rule already")
            _RULES[key] = function
        return function

    return decorate


def rule_for(func: Any) -> Rule | None:
    """The rule of an op: its own, that of the functional variant of an in-place op, or the pointwise rule where
    torch tags the op so."""
    name = str(func.overloadpacket)
    if name in _RULES:
        return _RULES[name]
    functional = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    if functional in _RULES:
        return _RULES[functional]
    if torch.Tag.pointwise in func.tags or _tagged_pointwise(functional):
        return _RULES["aten.pointwise"]
    return None


def _tagged_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name.removeprefix("aten."), None) if name.startswith("aten.") else None
    if packet is None:
        return False
    return any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())


for _family in _FAMILIES:
    import_module(f"{__name__}.{_family}")
