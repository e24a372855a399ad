"""Live modules inside torch's own wrappers: compiled, data-parallel, averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergeid.io.opening import module_of


def of_one_wrapping(models: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """The models; where only some are wrapped, what is inside all wrappers, and a note that says so."""
    modules = [module_of(m) for m in models]
    if any(m is None for m in modules) or len({tuple(m.state_dict()) for m in modules if m is not None}) == 1:
        return list(models), []
    inside = [_inside(m) for m in modules]
    if len({frozenset(m.state_dict()) for m in inside}) > 1:
        return list(models), []
    kinds = sorted({type(m).__name__ for m, inner in zip(modules, inside, strict=True) if m is not inner})
    return inside, [f"not all models are wrapped ({', '.join(kinds)}): what is inside was taken, with its own names"]


def _inside(module: Any) -> Any:
    children = list(module.named_children())
    while type(module).__module__.startswith("torch.") and [n for n, _ in children] in (["module"], ["_orig_mod"]):
        module = children[0][1]
        children = list(module.named_children())
    return module
