"""Model stock: how far to go from the base to the average (Jang et al. 2024, arXiv:2403.19522)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from mergeid.methods.pieces import Pieces, in_pieces, places, rows_at_once
from mergeid.methods.registry import Parameter, register_method
from mergeid.methods.task_arithmetic import wide

SMALLEST_DIVISOR = 1e-6
"""Of 1 + (N − 1) cos θ: at 0 the updates cancel, and the base is all that is left."""


@register_method(
    "model_stock",
    elementwise=False,
    weights="ignored",
    base=True,
    least=2,
    shows=True,
    parameters=[Parameter("filter_wise", False, help="an angle per row instead of per tensor")],
)
def model_stock(
    tensors: Sequence[Tensor], weights: Sequence[float], *, base: Tensor, filter_wise: bool = False
) -> Pieces:
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
    count, size = len(tensors), tensors[0].numel()
    rows = max(1, tensors[0].shape[0]) if filter_wise and tensors[0].dim() > 1 else 1
    width = max(1, size // rows)
    step = width * rows_at_once(width) if rows > 1 else None
    pairs = list(itertools.combinations_with_replacement(range(count), 2))
    flat = [t.reshape(-1) for t in (*tensors, base)]
    dots = torch.zeros(len(pairs), rows, dtype=torch.float64)
    for place in places(size, step):
        origin = flat[-1][place].to(to)
        deltas = [t[place].to(to, copy=True).sub_(origin) for t in flat[:-1]]
        if rows > 1:
            byrow = [d.reshape(-1, width) for d in deltas]
            found = torch.stack([(byrow[i] * byrow[j]).sum(1) for i, j in pairs])
        else:
            found = torch.stack([torch.dot(deltas[i], deltas[j]) for i, j in pairs])[:, None]
        here = slice(place.start // width, place.stop // width) if rows > 1 else slice(None)
        dots[:, here] += found
    product = dict(zip(pairs, dots, strict=True))
    smallest = torch.finfo(torch.float64).tiny
    cosines = [
        product[i, j] / (product[i, i] * product[j, j]).sqrt().clamp(min=smallest)
        for i, j in itertools.combinations(range(count), 2)
    ]
    cosine = torch.stack(cosines).mean(0).clamp(-1, 1)
    divisor = 1 + (count - 1) * cosine
    t = torch.where(divisor < SMALLEST_DIVISOR, torch.zeros_like(cosine), count * cosine / divisor)

    whole, by_row = float(t[0]), t.to(to)[:, None]

    def merge(place: slice, pieces: list[Tensor]) -> Tensor:
        origin, average = pieces[-1].to(to), pieces[0].to(to, copy=True)
        for piece in pieces[1:-1]:
            average.add_(piece.to(to))
        if rows > 1:
            own = by_row[place.start // width : place.stop // width]
            return torch.lerp(origin.reshape(-1, width), average.div_(count).reshape(-1, width), own).reshape(-1)
        return average.mul_(whole / count).add_(origin, alpha=1 - whole)

    return in_pieces([*tensors, base], dtype, merge, step)
