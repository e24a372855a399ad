"""Tensors that come from outside of a traced forward pass."""

from __future__ import annotations

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mergeid.neuron_graph.layout import FREE, FROZEN, Fine, Layout, uniform


def constant(tensor: Tensor, known: Tensor | None) -> Layout:
    """Frozen along the dimensions in which its values vary.

    Args:
        known: its values; None on the meta device.
    """
    if tensor._is_zerotensor():  # tangents of forward-mode differentiation, without memory
        return uniform(tensor.shape, FREE)
    if known is None or tensor.dim() == 0:
        return uniform(tensor.shape, FROZEN)
    value = known.detach()
    kinds = []
    with _disable_current_modes():
        for d, n in enumerate(tensor.shape):
            if n > 1 and tensor.numel():
                same = bool((value == value.narrow(d, 0, 1)).all())
                kinds.append(FREE if same else FROZEN)
            else:
                kinds.append(FROZEN)
    return Layout(tuple((Fine(n, k),) if n > 1 else () for n, k in zip(tensor.shape, kinds, strict=True)))
