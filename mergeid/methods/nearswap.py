"""NearSwap: where two models nearly agree, take the other's value (alchemonaut, QuartetAnemoi-70B-t0.0001)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mergeid.methods.registry import Parameter, register_method
from mergeid.methods.task_arithmetic import wide

SMALLEST = 1e-6
"""Differences below this count as this."""


@register_method(
    "nearswap",
    weights="ignored",
    parameters=[Parameter("t", 1e-4, 0.0, help="difference up to which the second model's value is taken")],
    most=2,
    ordered=True,
)
def nearswap(tensors: Sequence[Tensor], weights: Sequence[float], *, t: float = 1e-4) -> Tensor:
    """``a + s ⊙ (b − a)`` with ``s = min(t / max(|a − b|, 1e-6), 1)``: no element moves by more than t.

    Args:
        tensors: a (recipes call it the base) and b, of equal shape.
        weights: not looked at.
        t: in the weights' own unit.

    Returns:
        Tensor of that shape, in the narrowest dtype that holds both exactly.
    """
    dtype, to = wide(tensors)
    a, b = (x.to(to) for x in tensors)
    share = (b - a).abs_().clamp_(min=SMALLEST).reciprocal_().mul_(t).clamp_(0, 1)
    return (b * share).add_(a * (1 - share)).to(dtype)
