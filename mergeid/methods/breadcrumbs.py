"""Model Breadcrumbs: neither the smallest changes nor the outliers (Davari and Belilovsky 2023, arXiv:2312.06795)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergeid.methods.registry import Parameter
from mergeid.methods.sparse import Kept, Sparse, merge_kept, parameters, register_sparse
from mergeid.methods.task_arithmetic import wide

GAMMA = Parameter("gamma", 0.01, 0.0, 1.0, per_model=True, help="share of the largest changes that is dropped")


@dataclass(frozen=True)
class Breadcrumbs(Sparse):
    """`Sparse`, and the share of the largest changes that is dropped, one per model."""

    rescale: bool = False
    gamma: Sequence[float] = ()


_PARAMETERS = parameters(GAMMA, rescale=False, norm="l1", normalize=False)


def between(delta: Tensor, density: float, gamma: float) -> Tensor | None:
    """Which elements are kept: of n, the ⌊γn⌋ largest are dropped and the next ⌊density · n⌋ kept (fewer outliers are
    dropped where the density asks for more). What ties with the ends is kept too, so that the order of the neurons does
    not matter.

    Returns:
        Flat bool tensor; None for all.
    """
    if density >= 1:
        return None
    size = delta.abs().reshape(-1)
    count, target = len(size), int(density * len(size))
    if target == 0:
        return torch.zeros(count, dtype=torch.bool)
    low = max(0, count - target - int(gamma * count))
    high = low + target - 1
    ordered = size.numpy().copy()
    ordered.partition(sorted({low, high}))
    return (size >= float(ordered[low])) & (size <= float(ordered[high]))


def _kept(tensors: Sequence[Tensor], told: Breadcrumbs) -> list[Kept]:
    to = wide(tensors)[1]
    origin = told.base.to(to)
    return [
        Kept(between(tensor.to(to) - origin, density, gamma), density)
        for tensor, density, gamma in zip(tensors, told.density, told.gamma, strict=True)
    ]


@register_sparse("breadcrumbs", _PARAMETERS, Breadcrumbs)
def breadcrumbs(tensors: Sequence[Tensor], weights: Sequence[float], told: Breadcrumbs) -> Tensor:
    """``θ_0 + λ Σ_i w_i (m_i ⊙ (θ_i − θ_0))``, m_i without the smallest changes and without the largest (`between`).

    Args:
        tensors: θ_i, of equal shape.
        weights: w_i, of any size.
        told: θ_0, densities, gammas and the rest.

    Returns:
        Tensor of that shape, in the narrowest dtype that holds all θ_i exactly.
    """
    return merge_kept(tensors, weights, _kept(tensors, told), told, elect=False)


@register_sparse("breadcrumbs_ties", _PARAMETERS, Breadcrumbs)
def breadcrumbs_ties(tensors: Sequence[Tensor], weights: Sequence[float], told: Breadcrumbs) -> Tensor:
    """As `breadcrumbs`, but of the weighted deltas only those count whose sign is that of their sum, as in TIES.

    Args and result as for `breadcrumbs`.
    """
    return merge_kept(tensors, weights, _kept(tensors, told), told, elect=True)
