"""Names of a state dict that stand for one tensor: tied weights, a layer that is used in several places."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from mergeid.basics.on_demand import OnDemand, memory_of


def place_of(tensor: Tensor) -> Hashable:
    """Equal for two tensors that are one and the same values in memory."""
    if isinstance(tensor, OnDemand):
        return memory_of(tensor), tensor.turned
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_meta or not tensor.data_ptr():
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def first_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Every name -> the first name of the same tensor."""
    first: dict[Hashable, str] = {}
    return {name: first.setdefault(place_of(tensor), name) for name, tensor in state.items()}
