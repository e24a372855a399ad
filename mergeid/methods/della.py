"""DELLA: drop at random, small changes more often than large ones (Deep et al. 2024, arXiv:2406.11617)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergeid.errors import MergeidError
from mergeid.methods.registry import Parameter
from mergeid.methods.sparse import Kept, Sparse, bernoulli, merge_kept, parameters, register_sparse
from mergeid.methods.task_arithmetic import wide

EPSILON = Parameter(
    "epsilon", 0.15, 0.0, 1.0, per_model=True, help="how far the chance of being kept goes below and above the density"
)


@dataclass(frozen=True)
class Della(Sparse):
    """`Sparse`, and half the range of the chances of being kept, one per model."""

    epsilon: Sequence[float] = ()


def keep_probability(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """The chance of every element to be kept: from ``density − ε`` for the smallest magnitude to ``density + ε`` for
    the largest, in even steps by rank along axis 1 (along the whole vector where there is no such axis).

    Args:
        delta: a task vector of any shape.

    Returns:
        Flat float32 tensor.
    """
    rows = delta if delta.dim() > 1 else delta.reshape(1, -1)
    ranks = rows.abs().argsort(dim=1, stable=True).argsort(dim=1).to(torch.float32)
    last = max(rows.shape[1] - 1, 0)
    place = ranks.div_(last) if last else torch.full_like(ranks, 0.5)
    return place.mul_(2 * epsilon).add_(density - epsilon).reshape(-1)


def _kept(tensors: Sequence[Tensor], told: Della) -> list[Kept]:
    to = wide(tensors)[1]
    kept = []
    for tensor, density, epsilon in zip(tensors, told.density, told.epsilon, strict=True):
        if density >= 1:
            kept.append(Kept())
        elif density <= 0:
            kept.append(Kept(torch.zeros(tensor.numel(), dtype=torch.bool), 0.0))
        elif not epsilon < density < 1 - epsilon:
            raise MergeidError(
                f"density {density:g} with epsilon {epsilon:g} gives chances outside of 0 to 1; expected epsilon below "
                f"{min(density, 1 - density):g}"
            )
        else:
            chance = keep_probability(tensor.to(to) - told.base.to(to), density, epsilon)
            kept.append(Kept(bernoulli(chance, tensor.numel(), told.generator), chance))
    return kept


@register_sparse("della", parameters(EPSILON, rescale=True, normalize=True), Della, seeded=True)
def della(tensors: Sequence[Tensor], weights: Sequence[float], told: Della) -> Tensor:
    """As `della_linear`, but of the weighted deltas only those count whose sign is that of their sum, as in TIES.

    Args and result as for `della_linear`; `normalize` divides by the sum of the weights of those that agree.
    """
    return merge_kept(tensors, weights, _kept(tensors, told), told, elect=True)


@register_sparse("della_linear", parameters(EPSILON, rescale=True, normalize=False), Della, seeded=True)
def della_linear(tensors: Sequence[Tensor], weights: Sequence[float], told: Della) -> Tensor:
    """``θ_0 + λ Σ_i w_i (m_i ⊙ (θ_i − θ_0)) / p_i``, m_i Bernoulli(p_i), p_i by the rank of the change's magnitude
    (`keep_probability`).

    Args:
        tensors: θ_i, of equal shape.
        weights: w_i, of any size.
        told: θ_0, densities, epsilons and the rest; a `rescale_norm` other than "probability" restores that norm
            instead of dividing by p_i (mergekit restores "l1").

    Returns:
        Tensor of that shape, in the narrowest dtype that holds all θ_i exactly.

    Raises:
        MergeidError: density ± epsilon leaves (0, 1).
    """
    return merge_kept(tensors, weights, _kept(tensors, told), told, elect=False)
