"""TIES-Merging: trim, elect signs, merge what agrees (Yadav et al. 2023, arXiv:2306.01708)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergeid.methods.registry import Parameter, register_method
from mergeid.methods.task_arithmetic import LAMBDA, in_pieces, wide


@register_method(
    "ties",
    elementwise=False,
    weights="free",
    base=True,
    parameters=[
        Parameter("density", 1.0, 0.0, 1.0, per_model=True, help="share of each task vector that is kept"),
        LAMBDA,
        Parameter("normalize", True, help="divide by the weights of those that agree"),
    ],
)
def ties(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    base: Tensor,
    density: Sequence[float],
    scale: float = 1.0,
    normalize: bool = True,
) -> Tensor:
    """Trim each task vector τ_i = θ_i − θ_0, elect a sign per element, and merge the values that bear it.

    Trim: τ̂_i keeps the ``density_i`` share of largest magnitude. Elect: γ = sign(Σ_i w_i τ̂_i), zero counting as
    positive. Disjoint merge: ``θ_0 + λ Σ_{i∈A} w_i τ̂_i / Σ_{i∈A} w_i``, A = {i: sign(w_i τ̂_i) = γ}.

    Args:
        tensors: θ_i, of equal shape.
        weights: w_i; with `normalize` (the paper's mean) only their ratio counts.
        base: θ_0.
        density: share to keep, one per model.
        scale: λ.
        normalize: False leaves the division out.

    Returns:
        Tensor of that shape, in the narrowest dtype that holds all θ_i exactly.
    """
    dtype, to = wide(tensors)
    cuts = [threshold(tensor, base, share, to) for tensor, share in zip(tensors, density, strict=True)]

    def merge(_: slice, pieces: list[Tensor]) -> Tensor:
        origin = pieces[-1].to(to)
        deltas = [piece.to(to) - origin for piece in pieces[:-1]]
        parts = [d.mul_(d.abs() >= cut).mul_(w) for d, cut, w in zip(deltas, cuts, weights, strict=True)]
        return elect_and_merge(parts, weights, normalize).mul_(scale).add_(origin)

    return in_pieces([*tensors, base], dtype, merge)


def threshold(tensor: Tensor, base: Tensor, density: float, dtype: torch.dtype) -> float:
    """The magnitude from which on elements of ``tensor − base`` are kept: that of the ⌊density · n⌋-th largest, the
    largest at least.

    Elements that tie with it are kept too, so that the order of the neurons does not matter.
    """
    if density >= 1 or tensor.numel() == 0:
        return 0.0
    if density <= 0:
        return math.inf
    size = (tensor.to(dtype) - base.to(dtype)).abs_().reshape(-1).numpy()
    place = size.size - max(1, int(density * size.size))
    size.partition(place)
    return float(size[place])


def elect_and_merge(parts: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """Sum of the weighted deltas whose sign is that of their sum, over the sum of their weights with `normalize`."""
    total = parts[0].clone()
    for part in parts[1:]:
        total.add_(part)
    positive = total >= 0
    merged, divisor = torch.zeros_like(total), torch.zeros_like(total)
    for part, weight in zip(parts, weights, strict=True):
        agrees = torch.where(positive, part > 0, part < 0)
        merged.add_(part * agrees)
        divisor.add_(agrees, alpha=weight)
    if normalize:
        merged.div_(torch.where(divisor == 0, torch.ones_like(divisor), divisor))
    return merged
