"""Task arithmetic: add up what the fine-tunes learned (Ilharco et al. 2023, arXiv:2212.04089)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mergeid.methods.registry import Parameter, accumulator, register_method

LAMBDA = Parameter("lambda", 1.0, keyword="scale", help="factor of the merged task vector")
NEARLY_ZERO = 1e-8
"""Sums of weights below this are no divisors (opposite weights cancel)."""
CHUNK = 1 << 18
"""Elements computed at once where a whole tensor is merged: what is held beside inputs and result is about this."""


def wide(tensors: Sequence[Tensor]) -> tuple[torch.dtype, torch.dtype]:
    """(dtype of the result, dtype to compute in): the narrowest that holds all inputs, and its accumulator."""
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    return dtype, accumulator(dtype)


def in_pieces(tensors: Sequence[Tensor], dtype: torch.dtype, merge: Callable[[slice, list[Tensor]], Tensor]) -> Tensor:
    """Apply an elementwise function piece by piece.

    Args:
        tensors: of equal shape.
        dtype: of the result.
        merge: (place of the piece, the tensors' pieces, flat) -> that piece of the result.
    """
    flat = [t.reshape(-1) for t in tensors]
    out = torch.empty(tensors[0].shape, dtype=dtype)
    target = out.view(-1)
    for start in range(0, len(target), CHUNK):
        place = slice(start, min(start + CHUNK, len(target)))
        target[place] = merge(place, [t[place] for t in flat]).to(dtype)
    return out


@register_method(
    "task_arithmetic",
    weights="free",
    base=True,
    parameters=[LAMBDA, Parameter("normalize", False, help="divide by the sum of the weights")],
)
def task_arithmetic(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    base: Tensor,
    scale: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """``θ_0 + λ Σ_i w_i (θ_i − θ_0)``: task vectors τ_i = θ_i − θ_0, weighted, added to the base.

    Args:
        tensors: θ_i, of equal shape.
        weights: w_i, of any size; negative ones unlearn.
        base: θ_0.
        scale: λ.
        normalize: divide by Σ w_i.

    Returns:
        Tensor of that shape, in the narrowest dtype that holds all θ_i exactly.
    """
    dtype, to = wide(tensors)
    origin = base.to(to)
    total = torch.zeros_like(origin)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_((tensor.to(to) - origin).mul_(weight))
    divisor = math.fsum(weights)
    if normalize and abs(divisor) > NEARLY_ZERO:
        total.div_(divisor)
    return total.mul_(scale).add_(origin).to(dtype)
