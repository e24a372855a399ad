"""Model Breadcrumbs: neither the smallest changes nor the outliers (Davari and Belilovsky 2023, arXiv:2312.06795)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mergeid.methods.pieces import Pieces
from mergeid.methods.registry import Parameter
from mergeid.methods.sparse import Kept, Selects, Sparse, merge_kept, parameters, register_sparse
from mergeid.methods.task_arithmetic import wide
from mergeid.methods.ties import magnitudes_at

GAMMA = Parameter("gamma", 0.01, 0.0, 1.0, per_model=True, help="share of the largest changes that is dropped")


@dataclass(frozen=True)
class Breadcrumbs(Sparse):
    """`Sparse`, and the share of the largest changes that is dropped, one per model."""

    rescale: bool = False
    gamma: Sequence[float] = ()


_PARAMETERS = parameters(GAMMA, rescale=False, norm="l1", normalize=False)


def between(tensor: Tensor, base: Tensor, density: float, gamma: float, to: torch.dtype) -> tuple[float, float] | None:
    """The magnitudes of ``tensor − base`` between which elements are kept: of n, the ⌊γn⌋ largest are dropped and the
    next ⌊density · n⌋ kept (fewer outliers are dropped where the density asks for more). What ties with the ends is
    kept too, so that the order of the neurons does not matter.

    Returns:
        (lowest, highest); None for all.
    """
    if density >= 1:
        return None
    count = tensor.numel()
    target = int(density * count)
    if target == 0:
        return math.inf, -math.inf
    low = max(0, count - target - int(gamma * count))
    first, last = magnitudes_at(tensor, base, [low, low + target - 1], to)
    return first, last


def _kept(tensors: Sequence[Tensor], told: Breadcrumbs) -> list[Kept]:
    kept, to = [], wide(tensors)[1]
    for tensor, density, gamma in zip(tensors, told.density, told.gamma, strict=True):
        ends = between(tensor, told.base, density, gamma, to)
        kept.append(Kept() if ends is None else Kept(partial(_within, *ends), density))
    return kept


def _within(low: float, high: float) -> Selects:
    def select(_: slice, delta: Tensor) -> Tensor:
        size = delta.abs()
        below = torch.le(size, high, out=torch.empty_like(size))
        return torch.ge(size, low, out=size).mul_(below)

    return select


@register_sparse("breadcrumbs", _PARAMETERS, Breadcrumbs)
def breadcrumbs(tensors: Sequence[Tensor], weights: Sequence[float], told: Breadcrumbs) -> Pieces:
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
def breadcrumbs_ties(tensors: Sequence[Tensor], weights: Sequence[float], told: Breadcrumbs) -> Pieces:
    """As `breadcrumbs`, but of the weighted deltas only those count whose sign is that of their sum, as in TIES.

    Args and result as for `breadcrumbs`.
    """
    return merge_kept(tensors, weights, _kept(tensors, told), told, elect=True)
