"""The tensors inside whatever a model takes and returns: tuples, dicts, dataclasses, objects of other libraries."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mergeid.basics.casting import holds_numbers

T = TypeVar("T")


def named_tensors(value: Any) -> dict[str, Tensor]:
    """Every tensor in a nest, by where it stands there: ``""`` for a bare tensor, ``"1"``, ``"logits"``,
    ``"heads.0.boxes"``. A tensor that stands in several places is named once, by the first."""
    return {".".join(name): tensor for name, tensor in _walk(value, (), {})}


def examples_in(batch: Any) -> int:
    """How many examples a batch holds, in the first dimension of its tensors."""
    return next(len(v) for v in named_tensors(batch).values() if v.dim())


def returned_tensors(value: Any) -> dict[str, Tensor]:
    """Those that hold real or complex numbers: what a model computes, without indices and masks."""
    return {k: t for k, t in dense_tensors(value).items() if holds_numbers(t)}


def dense_tensors(value: Any) -> dict[str, Tensor]:
    """`named_tensors`, sparse ones filled up."""
    return {k: _strided(t) for k, t in named_tensors(value).items()}


def mapped(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """A copy of a nest, with every tensor in it changed."""
    memo: dict[int, Any] = {id(t): change(t) for t in named_tensors(value).values()}
    return copy.deepcopy(value, memo)


def _walk(value: Any, name: tuple[str, ...], seen: dict[int, Any]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    if id(value) in seen:
        return
    parts = None if isinstance(value, Tensor) else _parts(value)
    if isinstance(value, Tensor) or parts:
        seen[id(value)] = value  # held, so that no other object takes its identity meanwhile
    if isinstance(value, Tensor):
        yield name, value
    for key, part in parts or ():
        yield from _walk(part, (*name, key), seen)


def _parts(value: Any) -> list[tuple[str, Any]] | None:
    """What a container holds, by name; None for anything else."""
    if isinstance(value, (nn.Module, type, str, bytes, FunctionType, MethodType, ModuleType, partial)):
        return None
    if isinstance(value, Mapping):
        return [(str(k), v) for k, v in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, (list, tuple)):
        return [(str(i), v) for i, v in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return [(str(i), v) for i, v in enumerate(value) if isinstance(v, Tensor)]
    if dataclasses.is_dataclass(value):
        return [(f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value)]
    held = getattr(value, "__dict__", None)
    if isinstance(held, dict):  # a distribution, a graph of another library
        return [(str(k).strip("_"), v) for k, v in held.items()]
    return None


def _strided(tensor: Tensor) -> Tensor:
    if tensor.is_nested or tensor.layout == torch.strided:
        return tensor
    return tensor.to_dense()


def as_batch(inputs: Any) -> dict[str, Any]:
    """Example inputs of a live module: a batch dict as it is, anything else as positional arguments."""
    if isinstance(inputs, Mapping):
        return {str(k): v for k, v in inputs.items()}
    several = isinstance(inputs, (tuple, list)) and not hasattr(inputs, "_fields")  # a named tuple is one input
    return {f"arg{i}": v for i, v in enumerate(inputs if several else (inputs,))}
