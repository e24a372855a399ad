"""Task arithmetic: add up what the fine-tunes learned (Ilharco et al. 2023, arXiv:2212.04089)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergeid.methods.registry import Parameter, accumulator, register_method

LAMBDA = Parameter("lambda", 1.0, keyword="scale", help="factor of the merged task vector")
NEARLY_ZERO = 1e-8
"""Sums of weights below this are no divisors (opposite weights cancel)."""


def wide(tensors: Sequence[Tensor]) -> tuple[torch.dtype, torch.dtype]:
    """(dtype of the result, dtype to compute in): the narrowest that holds all inputs, and its accumulator."""
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    return dtype, accumulator(dtype)


@register_method(
    "task_arithmetic",
    weights="free",
    base=True,
    shows=True,
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
    total = tensors[0].to(to, copy=True).sub_(origin).mul_(weights[0])
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor.to(to, copy=True).sub_(origin).mul_(weight))
    divisor = math.fsum(weights)
    if normalize and abs(divisor) > NEARLY_ZERO:
        total.div_(divisor)
    return total.mul_(scale).add_(origin).to(dtype)
