"""Model stock: how far to go from the base to the average (Jang et al. 2024, arXiv:2403.19522)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from mergeid.merge.families.task_arithmetic import wide
from mergeid.merge.methods import Parameter, register_method

SMALLEST_DIVISOR = 1e-6
"""Of 1 + (N − 1) cos θ: at 0 the updates cancel, and the base is all that is left."""


@register_method(
    "model_stock",
    elementwise=False,
    weights="ignored",
    base=True,
    parameters=[Parameter("filter_wise", False, help="an angle per row instead of per tensor")],
)
def model_stock(
    tensors: Sequence[Tensor], weights: Sequence[float], *, base: Tensor, filter_wise: bool = False
) -> Tensor:
    """``t θ̄ + (1 − t) θ_0`` with ``t = N cos θ / (1 + (N − 1) cos θ)``.

    θ̄ is the plain average of the N models and θ the angle between their updates θ_i − θ_0, its cosine averaged over
    the pairs: t is where the line from the base to the average comes closest to the centre of the fine-tunes.

    Args:
        tensors: θ_i, of equal shape, at least two.
        weights: not looked at.
        base: θ_0.
        filter_wise: an angle for every row of a matrix (every filter of a convolution).

    Returns:
        Tensor of that shape, in the narrowest dtype that holds all θ_i exactly.
    """
    dtype, to = wide(tensors)
    shape = tensors[0].shape
    rows = shape[0] if filter_wise and len(shape) > 1 else 1
    origin = base.to(to).reshape(rows, -1)
    deltas = [t.to(to).reshape(rows, -1) - origin for t in tensors]
    lengths = [_dots(d, d).sqrt() for d in deltas]
    cosines = [
        _dots(deltas[i], deltas[j]) / (lengths[i] * lengths[j]).clamp(min=torch.finfo(torch.float64).tiny)
        for i, j in itertools.combinations(range(len(deltas)), 2)
    ]
    cosine = torch.stack(cosines).mean(0).clamp(-1, 1)
    count = len(tensors)
    divisor = 1 + (count - 1) * cosine
    t = torch.where(divisor < SMALLEST_DIVISOR, torch.zeros_like(cosine), count * cosine / divisor)
    average = sum(deltas[1:], deltas[0]) / count
    return (average * t[:, None].to(to)).add_(origin).reshape(shape).to(dtype)


def _dots(x: Tensor, y: Tensor) -> Tensor:
    """Row-wise Σ x y, float64 [rows]."""
    return (x * y).sum(1, dtype=torch.float64)
