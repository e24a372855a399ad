"""Of what kind each argument of a verb is to be: asked once, at the door, of what the verb's own signature says."""

from __future__ import annotations

import builtins
import inspect
import operator
import os
import sys
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Real
from typing import Annotated, Any, ForwardRef, TypeVar, Union, get_args, get_origin

from mergeid.errors import MergeidError, shown

Kinds = dict[str, Any]
"""Parameter -> its hint, evaluated; `Any` for one that cannot be told here."""

_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    types.NoneType: "None",
    os.PathLike: "a path",
    Sequence: "a list",
    tuple: "a tuple",
    Mapping: "a mapping",
    Callable: "a function",
}
_MANY = {str: "texts", int: "whole numbers", float: "numbers"}


def kinds_of(signature: inspect.Signature, modules: Iterable[str]) -> Kinds:
    """The hints of a verb's parameters, as far as they need nothing that only type checkers import.

    Args:
        modules: in whose names the hints are written, the verb's own last.
    """
    names = _Names({name: value for module in modules for name, value in vars(sys.modules[module]).items()})
    found = {p.name: _evaluated(p.annotation, names) for p in signature.parameters.values()}
    several = {p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_POSITIONAL}
    return {name: Sequence[hint] if name in several else hint for name, hint in found.items()}  # type: ignore[valid-type]


def checked(arguments: Mapping[str, Any], kinds: Kinds) -> dict[str, Any]:
    """The arguments, each of the kind that its hint asks for. Where texts are expected, one text stands for a list of
    it, which would otherwise be read letter by letter; where text is, a path, or a device or dtype of torch or NumPy,
    stands for its name; where a number is, one of NumPy's or torch's for Python's, also in lists; where a list is, any
    iterable, or None for none.

    Raises `MergeidError` for an argument of another kind."""
    found = dict(arguments)
    for name, hint in kinds.items():
        if name not in found:
            continue
        value = found[name] = _gathered(_number_of(found[name], hint), hint)
        if _fits(value, hint):
            continue
        if isinstance(value, str) and _fits((value,), hint):
            found[name] = (value,)
        elif (text := _name_of(value)) is not None and _fits(text, hint):
            found[name] = text
        else:
            raise MergeidError(_sentence(name, value, hint))
    return found


class _Names(dict[str, Any]):
    """What hints may name; what only type checkers import stands for anything."""

    def __missing__(self, name: str) -> Any:
        return vars(builtins)[name] if hasattr(builtins, name) else TypeVar(name)  # type: ignore[misc]


def _evaluated(annotation: Any, names: _Names) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any
    try:
        return eval(annotation, {}, names) if isinstance(annotation, str) else annotation
    except (AttributeError, TypeError):  # of a module that is not imported here
        return Any


def _choices(hint: Any) -> list[Any]:
    """The kinds that a hint allows, without what is said about them."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) in (Union, types.UnionType):
        return [choice for part in get_args(hint) for choice in _choices(part)]
    return [types.NoneType if hint is None else hint]


def _fits(value: Any, hint: Any) -> bool:
    return any(_is(value, choice) for choice in _choices(hint))


def _is(value: Any, choice: Any) -> bool:
    kind = get_origin(choice) or choice
    if kind is Any or isinstance(kind, (str, ForwardRef, TypeVar)) or not isinstance(kind, type):
        return True
    if kind is bool:
        return isinstance(value, bool) or (_whole(value) in (0, 1) and not hasattr(value, "shape"))
    if kind is int:
        return not isinstance(value, bool) and _whole(value) is not None
    if kind is float:
        return not isinstance(value, bool) and isinstance(value, Real)
    if kind is Sequence or kind is tuple:
        return _is_list(value) and _odd_one(value, choice) is None
    return isinstance(value, kind)


def _number_of(value: Any, hint: Any) -> Any:
    choices = _choices(hint)
    if {bool, int, float} & {*choices} and not isinstance(value, (int, float)):
        if getattr(value, "shape", None) == () and hasattr(value, "item"):
            return value.item()
        if float in choices and isinstance(value, Real):  # a fraction
            return float(value)
    entries = next((get_args(c)[0] for c in choices if get_origin(c) is Sequence and get_args(c)), None)
    if entries in (int, float) and _is_list(value) and isinstance(value, Collection):
        return tuple(_number_of(entry, entries) for entry in value)
    return value


def _gathered(value: Any, hint: Any) -> Any:
    """Iterables that are used up, or have no order, as they come."""
    choices = _choices(hint)
    others = [choice for choice in choices if get_origin(choice) is not Sequence]
    if len(others) == len(choices) or any(_is(value, c) for c in others if isinstance(get_origin(c) or c, type)):
        return value
    if value is None and not any(c is Any for c in others):
        return ()
    return tuple(value) if _is_list(value) and not hasattr(value, "__getitem__") else value


def _is_list(value: Any) -> bool:
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping, type)):
        return False
    return getattr(value, "shape", None) != ()  # an array without dimensions has nothing to go through


def _odd_one(value: Any, choice: Any) -> tuple[Any] | None:
    """The first entry of another kind, where that can be seen without using the entries up."""
    parts = get_args(choice)
    told = parts not in ((), (Any,)) and get_origin(parts[0]) is not tuple  # of pairs the verb says more
    if get_origin(choice) is not Sequence or not told or not isinstance(value, Collection):
        return None
    return next(((entry,) for entry in value if not _fits(entry, parts[0])), None)


def _whole(value: Any) -> int | None:
    try:
        return operator.index(value)
    except TypeError:
        return None


def _name_of(value: Any) -> str | None:
    if isinstance(value, os.PathLike):
        name = os.fspath(value)
        return name if isinstance(name, str) else None
    if type(value).__module__ == "torch" and type(value).__name__ in ("dtype", "device"):
        return str(value).removeprefix("torch.")
    if getattr(value, "__module__", None) == "numpy" and isinstance(value, type):  # numpy.float16
        return value.__name__
    name = getattr(value, "name", None) if type(value).__module__.startswith("numpy") else None
    return name if isinstance(name, str) else None


def _sentence(name: str, value: Any, hint: Any) -> str:
    for choice in _choices(hint):
        if _is_list(value) and get_origin(choice) is Sequence and (odd := _odd_one(value, choice)) is not None:
            return f"{name} has an entry that is {_told(odd[0])}; expected {_described(get_args(choice)[0])}"
    return f"{name} is {_told(value)}; expected {_described(hint)}"


def _told(value: Any) -> str:
    return repr(value) if value is None or isinstance(value, bool) else shown(value)


def _described(hint: Any) -> str:
    words = []
    for choice in _choices(hint):
        kind = get_origin(choice) or choice
        inside = _MANY.get(get_args(choice)[0]) if kind is Sequence and get_args(choice) else None
        named = _NAMES.get(kind) or f"a {getattr(kind, '__name__', None) or kind.__forward_arg__}"
        words.append(f"{named} of {inside}" if inside else named)
    return " or ".join(dict.fromkeys(words))
