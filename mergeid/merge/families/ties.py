"""TIES-Merging: trim, elect signs, merge what agrees (Yadav et al. 2023, arXiv:2306.01708)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergeid.merge.families.task_arithmetic import LAMBDA, wide
from mergeid.merge.methods import Parameter, register_method


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
    origin = base.to(to)
    parts = [
        trim(tensor.to(to) - origin, share).mul_(weight)
        for tensor, share, weight in zip(tensors, density, weights, strict=True)
    ]
    return elect_and_merge(parts, weights, normalize).mul_(scale).add_(origin).to(dtype)


def trim(delta: Tensor, density: float) -> Tensor:
    """`delta` with all but its ⌊density · n⌋ (at least one) elements of largest magnitude set to 0, in place.

    Elements that tie with the smallest of those are kept too, so that the order of the neurons does not matter.
    """
    if density >= 1 or delta.numel() == 0:
        return delta
    if density <= 0:
        return delta.zero_()
    size = delta.abs().reshape(-1)
    keep = max(1, int(density * size.numel()))
    threshold = size.kthvalue(size.numel() - keep + 1).values
    return delta.mul_(delta.abs() >= threshold)


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
