"""Modules as they can be copied: what a module holds besides its layers and tensors goes along.

Python does not copy functions: one that refers to the module's layers (`self.f = lambda x: relu(self.a(x))`) would call
the original's in a copy. Tensors that a module keeps of its last pass (`self.aux_loss = …`), gradients' graphs
included, cannot be copied at all.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, MutableMapping, MutableSequence
from types import CellType, FunctionType
from typing import Any

from torch import Tensor, nn

from mergeid.basics.nested import named_tensors

OWN = frozenset(vars(nn.Module()))
"""What torch itself keeps on a module, hooks among it."""


class Carried:
    """A function whose copies refer to the copies of what it refers to."""

    def __init__(self, function: FunctionType) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Carried:
        old = self.function

        def copied(value: Any) -> Any:
            return copy.deepcopy(value, memo) if isinstance(value, (nn.Module, Tensor, Carried)) else value

        cells = tuple(CellType(copied(c.cell_contents)) if _full(c) else c for c in old.__closure__ or ())
        defaults = None if old.__defaults__ is None else tuple(map(copied, old.__defaults__))
        new = FunctionType(old.__code__, old.__globals__, old.__name__, defaults, cells)
        new.__kwdefaults__ = {k: copied(v) for k, v in (old.__kwdefaults__ or {}).items()} or None
        new.__dict__.update(old.__dict__)
        return Carried(new)


def copyable(module: nn.Module) -> nn.Module:
    """The module itself, or, where it holds functions that refer to layers or tensors of its last pass, a copy with the
    same parameters that can be copied in turn."""
    places, leftovers = list(_places(module)), _leftovers(module)
    if not places and not leftovers:
        return module
    memo: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    memo |= {id(t): t.detach().clone() for t in leftovers}
    made = copy.deepcopy(module, memo)
    for name, path, function in places:
        holder: Any = vars(made.get_submodule(name))
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = copy.deepcopy(Carried(function), memo)
    return made


def _leftovers(module: nn.Module) -> list[Tensor]:
    held = [v for m in module.modules() for v in vars(m).values() if isinstance(v, (Tensor, list, tuple, dict))]
    return [t for value in held for t in named_tensors(value).values() if t.grad_fn is not None]


def _places(module: nn.Module) -> Iterator[tuple[str, tuple[Any, ...], FunctionType]]:
    """Of every function that refers to a layer or tensor: the module's name, the way to it there, and itself."""
    for name, owner in module.named_modules():
        for attribute, value in vars(owner).items():
            if attribute in OWN:
                continue
            inside: list[tuple[tuple[Any, ...], Any]] = [((attribute,), value)]
            if isinstance(value, MutableMapping):
                inside = [((attribute, key), v) for key, v in value.items()]
            elif isinstance(value, MutableSequence):
                inside = [((attribute, i), v) for i, v in enumerate(value)]
            for path, each in inside:
                if isinstance(each, FunctionType) and _refers(each):
                    yield name, path, each


def _refers(function: FunctionType) -> bool:
    seen = [c.cell_contents for c in function.__closure__ or () if _full(c)]
    seen += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return any(isinstance(value, (nn.Module, Tensor)) for value in seen)


def _full(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
