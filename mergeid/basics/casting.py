"""Another precision: real numbers stay real, and complex ones complex."""

from __future__ import annotations

from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def kept_kind(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a tensor becomes in the precision of a real `dtype`: that, the complex one of as many digits (at least
    complex64, since few operations take less), or for integers and bools what they are."""
    if tensor.is_complex():
        return torch.complex128 if dtype == torch.float64 else torch.complex64
    return dtype if tensor.is_floating_point() else tensor.dtype


def holds_numbers(tensor: Tensor) -> bool:
    """Whether these are real or complex numbers, and no indices or flags."""
    return tensor.is_floating_point() or tensor.is_complex()


def in_precision(module: M, dtype: torch.dtype | None, device: torch.device | None = None) -> M:
    """``module.to(device, dtype)``, in place, which would drop the imaginary parts of complex weights."""
    tensors = chain(module.parameters(), module.buffers())
    if dtype is None or not any(t.is_complex() for t in tensors):
        return module.to(device=device, dtype=dtype)
    wanted = dtype

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=kept_kind(tensor, wanted))

    done: M = module._apply(moved)  # type: ignore[no-untyped-call]
    return done
