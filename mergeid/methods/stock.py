"""Model stock: how far to go from the base to the average (Jang et al. 2024, arXiv:2403.19522)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from mergeid.methods.registry import Parameter, register_method
from mergeid.methods.task_arithmetic import CHUNK, wide

SMALLEST_DIVISOR = 1e-6
"""Of 1 + (N − 1) cos θ: at 0 the updates cancel, and the base is all that is left."""


@register_method(
    "model_stock",
    elementwise=False,
    weights="ignored",
    base=True,
    least=2,
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
    rows = tensors[0].shape[0] if filter_wise and tensors[0].dim() > 1 else 1
    count, width = len(tensors), tensors[0].numel() // rows if rows else 0
    read = [t.reshape(rows, width) for t in (*tensors, base)]
    places = [slice(c, c + max(1, CHUNK // rows)) for c in range(0, width, max(1, CHUNK // rows))]
    dots = torch.zeros(count, count, rows, dtype=torch.float64)
    for place in places:
        origin = read[-1][:, place].to(to)
        deltas = [t[:, place].to(to) - origin for t in read[:-1]]
        for i, j in itertools.combinations_with_replacement(range(count), 2):
            dots[i, j] += (deltas[i] * deltas[j]).sum(1, dtype=torch.float64)
    smallest = torch.finfo(torch.float64).tiny
    cosines = [
        dots[i, j] / (dots[i, i] * dots[j, j]).sqrt().clamp(min=smallest)
        for i, j in itertools.combinations(range(count), 2)
    ]
    cosine = torch.stack(cosines).mean(0).clamp(-1, 1)
    divisor = 1 + (count - 1) * cosine
    t = torch.where(divisor < SMALLEST_DIVISOR, torch.zeros_like(cosine), count * cosine / divisor)
    out = torch.empty(rows, width, dtype=dtype)
    for place in places:
        origin = read[-1][:, place].to(to)
        average = sum((x[:, place].to(to) - origin for x in read[1:-1]), read[0][:, place].to(to) - origin) / count
        out[:, place] = (average * t[:, None].to(to)).add_(origin).to(dtype)
    return out.reshape(tensors[0].shape)
