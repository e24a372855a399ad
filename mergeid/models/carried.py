"""Modules as they can be copied: what a module holds besides its layers and tensors goes along.

Python does not copy functions: one that refers to the module's layers (`self.f = lambda x: relu(self.a(x))`, a forward
that is wrapped, a hook) would call the original's in a copy. Tensors that a module keeps of its last pass
(`self.aux_loss = …`), gradients' graphs included, cannot be copied at all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, MutableMapping, MutableSequence
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from mergeid.basics.nested import named_tensors

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
OWN = frozenset(vars(nn.Module())) - set(HOOKS)
"""What torch itself keeps on a module."""
Memo = dict[int, Any]


class Carried:
    """A callable whose copies refer to the copies of what it refers to."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: Memo) -> Carried:
        return Carried(_copied(self.function, memo))


def _copied(value: Any, memo: Memo) -> Any:
    """A copy of what refers to a layer or tensor, however deep; what does not is shared."""
    if not _holds(value):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor) and value.grad_fn is not None:  # of a pass, kept by a hook
        return memo.setdefault(id(value), value.detach().clone())
    if isinstance(value, FunctionType):
        return _copied_function(value, memo)
    if isinstance(value, MethodType):
        return MethodType(_copied(value.__func__, memo), _copied(value.__self__, memo))
    if isinstance(value, partial):
        keywords = {k: _copied(v, memo) for k, v in value.keywords.items()}
        return partial(_copied(value.func, memo), *(_copied(v, memo) for v in value.args), **keywords)
    if type(value) in (list, tuple):
        return memo.setdefault(id(value), type(value)(_copied(v, memo) for v in value))
    if type(value) is dict:
        return memo.setdefault(id(value), {k: _copied(v, memo) for k, v in value.items()})
    return copy.deepcopy(value, memo)


def _copied_function(old: FunctionType, memo: Memo) -> Carried:
    cells = tuple(CellType() if _full(c) and _holds(c.cell_contents) else c for c in old.__closure__ or ())
    new = FunctionType(old.__code__, old.__globals__, old.__name__, None, cells)
    memo[id(old)] = carried = Carried(new)  # before what it refers to, which may be itself
    for cell, was in zip(cells, old.__closure__ or (), strict=True):
        if cell is not was:
            cell.cell_contents = _copied(was.cell_contents, memo)
    new.__defaults__ = None if old.__defaults__ is None else tuple(_copied(v, memo) for v in old.__defaults__)
    new.__kwdefaults__ = {k: _copied(v, memo) for k, v in (old.__kwdefaults__ or {}).items()} or None
    new.__dict__.update(old.__dict__)
    return carried


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


def _places(module: nn.Module) -> Iterator[tuple[str, tuple[Any, ...], Callable[..., Any]]]:
    """Of every callable that Python's copies would not follow: the module's name, the way to it there, and itself."""
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
                if isinstance(each, (FunctionType, MethodType, partial)) and _functions(each):
                    yield name, path, each


def _functions(value: Any) -> bool:
    """Whether a function that refers to a layer or tensor is part of a callable: Python copies the rest itself."""
    if isinstance(value, MethodType):
        return _functions(value.__func__)
    if isinstance(value, partial):
        return any(map(_functions, (value.func, *value.args, *value.keywords.values())))
    return isinstance(value, FunctionType) and _holds(value)


def _holds(value: Any, seen: frozenset[int] = frozenset()) -> bool:
    """Whether it is, or refers to, a layer or tensor."""
    if isinstance(value, (nn.Module, Tensor, Carried)):
        return True
    if id(value) in seen:
        return False
    parts: Iterable[Any] = ()
    if isinstance(value, FunctionType):
        parts = [c.cell_contents for c in value.__closure__ or () if _full(c)]
        parts = [*parts, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    elif isinstance(value, MethodType):
        parts = (value.__self__, value.__func__)
    elif isinstance(value, partial):
        parts = (value.func, *value.args, *value.keywords.values())
    elif type(value) in (list, tuple):
        parts = value
    elif type(value) is dict:
        parts = value.values()
    return any(_holds(part, seen | {id(value)}) for part in parts)


def _full(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
