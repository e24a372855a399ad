"""Fisher-weighted averaging (Matena & Raffel 2022, arXiv:2111.09832)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergeid.methods.registry import linear, register_method
from mergeid.methods.task_arithmetic import wide


@register_method("fisher", statistics="fisher")
def fisher(tensors: Sequence[Tensor], weights: Sequence[float], *, statistics: Sequence[Tensor] | None) -> Tensor:
    """``Σ_i w_i F_i θ_i / Σ_i w_i F_i``, per element: each model counts where its output depends on the parameter.

    Args:
        tensors: θ_i, of equal shape.
        weights: w_i.
        statistics: diagonal Fisher information F_i ≥ 0 of each model, of the same shape
            (`mergeid.methods.statistics.fisher_diagonal`). Elements on which none of them says anything, and tensors
            without (None: buffers), are averaged by the weights alone.

    Returns:
        Tensor of that shape, in the narrowest dtype that holds all θ_i exactly.
    """
    plain = linear(tensors, weights)
    if statistics is None:
        return plain
    dtype, _ = wide(tensors)
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    mass = torch.zeros_like(total)
    largest = torch.stack([f.to(torch.float64) for f in statistics]).amax(0)
    for tensor, weight, information in zip(tensors, weights, statistics, strict=True):
        # Relative to the largest: products of tiny numbers would underflow.
        part = weight * information.to(torch.float64) / torch.where(largest > 0, largest, torch.ones_like(largest))
        mass.add_(part)
        total.add_(part * tensor.to(torch.float64))
    known = (largest > 0) & (mass.abs() > 1e-12)
    return torch.where(known, total / torch.where(known, mass, torch.ones_like(mass)), plain.double()).to(dtype)
