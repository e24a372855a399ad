"""Tensors that are one and the same values in memory: tied weights, layers of several names, views of each other."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from mergeid.basics.on_demand import OnDemand, memory_of


def address_of(tensor: Tensor) -> int:
    """Where a tensor's values begin in memory; 0 where it holds none (meta, empty, sparse, a wrapper of others)."""
    if isinstance(tensor, OnDemand) or tensor.is_nested or tensor.layout != torch.strided or tensor.is_meta:
        return 0
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a subclass without memory of its own
        return 0


def place_of(tensor: Tensor) -> Hashable:
    """Equal for two tensors that are one and the same values in memory, in the same order of axes."""
    if isinstance(tensor, OnDemand):
        return memory_of(tensor), tensor.turned
    return (*view_of(tensor), axes_in_memory(tensor), tuple(tensor.shape)) if address_of(tensor) else id(tensor)


def view_of(tensor: Tensor) -> tuple[Hashable, ...]:
    """Equal for two tensors that are the same values in memory, in any order of axes."""
    order = axes_in_memory(tensor)
    return address_of(tensor), tensor.dtype, tuple((tensor.stride(d), tensor.shape[d]) for d in order)


def axes_in_memory(tensor: Tensor) -> tuple[int, ...]:
    """The axes of more than one position, by how far apart these lie."""
    axes = [d for d, n in enumerate(tensor.shape) if n > 1]
    return tuple(sorted(axes, key=lambda d: (tensor.stride(d), tensor.shape[d])))


def tied_groups(model: nn.Module) -> list[tuple[str, ...]]:
    """Keys of the state dict, those of one tensor together."""
    groups: dict[int, list[str]] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(value), []).append(key)
    return [tuple(group) for group in groups.values()]


def first_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Every name -> the first name of the same tensor."""
    first: dict[Hashable, str] = {}
    return {name: first.setdefault(place_of(tensor), name) for name, tensor in state.items()}


def overlapping(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those that share some of their memory with another of these, and are not the same values (`view_of`)."""
    views = {view_of(t): t for t in tensors if address_of(t)}
    by_storage: dict[int, list[Tensor]] = {}
    for tensor in views.values():
        by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    found: set[Hashable] = set()
    for group in by_storage.values():
        ranges = sorted((address_of(t), _end(t)) for t in group)
        if all(end <= begin for (_, end), (begin, _) in pairwise(ranges)):
            continue
        if len({t.element_size() for t in group}) > 1:
            found |= {view_of(t) for t in group}
            continue
        first = min(t.storage_offset() for t in group)
        every = torch.arange(max(_reach(t) + t.storage_offset() for t in group) - first)
        uses = torch.zeros_like(every)
        places = [every.as_strided(t.shape, t.stride(), t.storage_offset() - first).flatten() for t in group]
        for at in places:
            uses[at] += 1
        found |= {view_of(t) for t, at in zip(group, places, strict=True) if int(uses[at].max()) > 1}
    return [t for t in tensors if address_of(t) and view_of(t) in found]


def _reach(tensor: Tensor) -> int:
    """From the first value in memory to behind the last."""
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _end(tensor: Tensor) -> int:
    return address_of(tensor) + _reach(tensor) * tensor.element_size()


def written_among(func: OpOverload, bound: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes into; bound: its arguments, by the names of its schema."""
    over = [bound.get(a.name) for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [x for x in tree_leaves(over) if isinstance(x, Tensor)]


def shared_alike(copied: nn.Module, original: nn.Module) -> nn.Module:
    """The copy, whose parameters are one in memory where the original's are: copies of parameters are apart."""
    first: dict[Hashable, tuple[nn.Parameter, Tensor]] = {}
    copies = dict(copied.named_parameters(remove_duplicate=False))
    for name, value in original.named_parameters(remove_duplicate=False):
        mine = copies.get(name)
        if mine is None or not address_of(value):
            continue
        one, its = first.setdefault(view_of(value), (mine, value))
        if one is mine:
            continue
        if place_of(its) == place_of(value):
            module, _, key = name.rpartition(".")
            copied.get_submodule(module)._parameters[key] = one
        else:
            mine.data = _turned(one.data, its, value)
    return copied


def _turned(value: Tensor, has: Tensor, wants: Tensor) -> Tensor:
    """A view of `value`, whose axes are those of `has`, with the axes of another view of the same memory."""
    ours, theirs = axes_in_memory(has), axes_in_memory(wants)
    left = sorted(ours)
    return value.squeeze().permute([left.index(ours[theirs.index(d)]) for d in sorted(theirs)]).view(wants.shape)
