"""DELLA: drop at random, small changes more often than large ones (Deep et al. 2024, arXiv:2406.11617)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergeid.errors import MergeidError
from mergeid.methods.pieces import Pieces, rows_at_once
from mergeid.methods.registry import Parameter
from mergeid.methods.sparse import NOTHING, Kept, Selects, Sparse, Uniform, merge_kept, parameters, register_sparse

EPSILON = Parameter(
    "epsilon",
    0.15,
    0.0,
    1.0,
    per_model=True,
    help="how far the probability of being kept goes below and above the density",
)


@dataclass(frozen=True)
class Della(Sparse):
    """`Sparse`, and half the range of the chances of being kept, one per model."""

    epsilon: Sequence[float] = ()


def keep_probability(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """The chance of every element to be kept: from ``density − ε`` for the smallest magnitude to ``density + ε`` for
    the largest, in even steps by rank along axis 1 (along the whole vector where there is no such axis).

    Args:
        delta: a task vector of any shape, or some of its rows.

    Returns:
        Flat float32 tensor.
    """
    rows = delta if delta.dim() > 1 else delta.reshape(1, -1)
    ranks = rows.abs().argsort(dim=1, stable=True).argsort(dim=1).to(torch.float32)
    last = max(rows.shape[1] - 1, 0)
    place = ranks.div_(last) if last else torch.full_like(ranks, 0.5)
    return place.mul_(2 * epsilon).add_(density - epsilon).reshape(-1)


def _by_rank(told: Della, density: float, epsilon: float) -> Kept:
    if density >= 1:
        return Kept()
    if density <= 0:
        return NOTHING
    if not epsilon < density < 1 - epsilon:
        raise MergeidError(
            f"density {density:g} with epsilon {epsilon:g} gives probabilities outside 0 to 1; expected epsilon below "
            f"{min(density, 1 - density):g}"
        )
    row = told.base.shape[1:] if told.base.dim() > 1 else told.base.shape
    numbers = Uniform(told.generator)

    def begin() -> Selects:
        draw = numbers.begin()

        def select(_: slice, delta: Tensor) -> Tensor:
            chance = keep_probability(delta.reshape(-1, *row) if len(row) else delta, density, epsilon)
            return chance.mul_(draw(len(chance)) < chance)

        return select

    return Kept(begin, None)


def _merge(tensors: Sequence[Tensor], weights: Sequence[float], told: Della, elect: bool) -> Pieces:
    kept = [_by_rank(told, density, epsilon) for density, epsilon in zip(told.density, told.epsilon, strict=True)]
    rows = told.base.shape[0] if told.base.dim() > 1 else 1
    width = told.base.numel() // max(rows, 1)
    return merge_kept(tensors, weights, kept, told, elect, step=max(1, width) * rows_at_once(width))


@register_sparse("della", parameters(EPSILON, rescale=True, normalize=True), Della, seeded=True)
def della(tensors: Sequence[Tensor], weights: Sequence[float], told: Della) -> Pieces:
    """As `della_linear`, but of the weighted deltas only those count whose sign is that of their sum, as in TIES.

    Args and result as for `della_linear`; `normalize` divides by the sum of the weights of those that agree.
    """
    return _merge(tensors, weights, told, elect=True)


@register_sparse("della_linear", parameters(EPSILON, rescale=True, normalize=False), Della, seeded=True)
def della_linear(tensors: Sequence[Tensor], weights: Sequence[float], told: Della) -> Pieces:
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
    return _merge(tensors, weights, told, elect=False)
