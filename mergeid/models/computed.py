"""Weights that a library computes itself and leaves out of its files: sinusoidal positions and the like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mergeid.plugins import Adapter, ComputesTables

if TYPE_CHECKING:
    from torch import nn


def fill_computed(
    model: nn.Module, adapter: Adapter, missing: Sequence[str], again: Callable[[], nn.Module]
) -> set[str]:
    """Make constants of the weights that a file lacks and the library computes: they keep their values, and are no
    part of the state dict any more. So no neuron is put into another order there, which no file could hold.

    Args:
        missing: keys of the model's state dict.
        again: builds the model anew. What comes out otherwise the second time is random, and stays missing.

    Returns:
        the keys that were filled.
    """
    import torch

    stated = list(adapter.computed(model, missing)) if isinstance(adapter, ComputesTables) else []
    if not stated:
        return set()
    own, second = model.state_dict(), again().state_dict()
    filled = [k for k in stated if own[k].is_meta or torch.equal(own[k].cpu(), second[k].cpu())]
    for key in filled:
        path, _, name = key.rpartition(".")
        owner = model.get_submodule(path)
        value = second[key].to(own[key].dtype) if own[key].is_meta else own[key]
        delattr(owner, name)
        owner.register_buffer(name, value.detach(), persistent=False)
    return set(filled)
