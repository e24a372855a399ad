"""Passthrough: one model's tensors as they are, or scaled; for stacking slices of layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mergeid.methods.registry import Parameter, register_method
from mergeid.methods.task_arithmetic import wide


@register_method(
    "passthrough",
    weights="ignored",
    parameters=[Parameter("scale", 1.0, per_model=True, help="factor of the tensor")],
    most=1,
)
def passthrough(tensors: Sequence[Tensor], weights: Sequence[float], *, scale: Sequence[float] = (1.0,)) -> Tensor:
    """``c θ``.

    Args:
        tensors: one.
        weights: not looked at.
        scale: c, one.

    Returns:
        Tensor of its shape and dtype; the same bits for c = 1.
    """
    dtype, to = wide(tensors[:1])
    return tensors[0].clone() if scale[0] == 1 else tensors[0].to(to).mul(scale[0]).to(dtype)
