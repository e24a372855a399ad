"""NuSLERP: slerp of two models or of two task vectors, whole or row by row (mergekit's own)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergeid.methods.registry import Parameter, register_method
from mergeid.methods.spherical import angle
from mergeid.methods.task_arithmetic import wide

SHORTEST = 1e-7
"""Vectors shorter than this are no unit vectors after division by their length, which is taken as this."""
NO_CIRCLE = 1e-16
"""Of 1 − cos² θ: there the straight line is taken."""


@register_method(
    "nuslerp",
    elementwise=False,
    base="optional",
    parameters=[
        Parameter("nuslerp_flatten", True, help="one angle for the whole tensor"),
        Parameter("nuslerp_row_wise", False, help="not flattened: vectors along the first axis, not along the last"),
    ],
    most=2,
)
def nuslerp(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    base: Tensor | None = None,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Tensor:
    """``(sin((1−t)θ) x_1 + sin(tθ) x_2) / sin θ`` for ``t = w_2 / (w_1 + w_2)``, x the models or, with a base, what
    they add to it. A zero vector stands at a right angle to everything.

    Args:
        tensors: θ_1 and θ_2, of equal shape.
        weights: w_1 and w_2, with sum 1.
        base: θ_0.
        nuslerp_flatten: one angle θ for the whole tensor; False: one per vector along an axis.
        nuslerp_row_wise: that axis is the first, else the last.

    Returns:
        Tensor of that shape, in the narrowest dtype that holds both exactly.
    """
    dtype, to = wide(tensors)
    if base is None and torch.equal(tensors[0], tensors[1]):
        return tensors[0].to(dtype, copy=True)
    origin = None if base is None else base.to(to)
    a, b = (t.to(to) if origin is None else t.to(to) - origin for t in tensors)
    if nuslerp_flatten or a.dim() == 0:
        parallel = torch.equal(a, b)
        cosine = torch.tensor(1.0 if parallel else math.cos(_angle(a, b)), dtype=torch.float64)
    else:
        axis = 0 if nuslerp_row_wise else -1
        x, y = (v.double() / v.double().norm(dim=axis, keepdim=True).clamp(min=SHORTEST) for v in (a, b))
        cosine = (x * y).sum(axis, keepdim=True).clamp_(-1, 1)
    ours, theirs = _factors(cosine, weights[1])
    merged = (a * ours.to(to)).add_(b * theirs.to(to))
    return (merged if origin is None else merged.add_(origin)).to(dtype)


def _angle(a: Tensor, b: Tensor) -> float:
    return angle(a, b) if bool(a.any()) and bool(b.any()) else math.pi / 2


def _factors(cosine: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """The two coefficients, for every angle."""
    straight = 1 - cosine.square() <= NO_CIRCLE
    theta = torch.arccos(torch.where(straight, 0, cosine))
    sine = torch.sin(theta)
    ours = torch.where(straight, 1 - t, torch.sin((1 - t) * theta) / sine)
    theirs = torch.where(straight, t, torch.sin(t * theta) / sine)
    return ours, theirs
