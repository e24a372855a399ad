"""DARE: drop most of what a fine-tune changed, at random, and rescale the rest (Yu et al. 2024, arXiv:2311.03099)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mergeid.methods.pieces import Pieces
from mergeid.methods.sparse import Kept, Sparse, at_random, merge_kept, parameters, register_sparse


def _kept(told: Sparse) -> list[Kept]:
    return [at_random(share, told.generator) for share in told.density]


@register_sparse("dare_linear", parameters(rescale=True, normalize=False), seeded=True)
def dare_linear(tensors: Sequence[Tensor], weights: Sequence[float], told: Sparse) -> Pieces:
    """``θ_0 + λ Σ_i w_i (m_i ⊙ (θ_i − θ_0)) / density_i``, m_i Bernoulli(density_i) per element.

    Args:
        tensors: θ_i, of equal shape.
        weights: w_i, of any size.
        told: θ_0, densities and the rest; a `rescale_norm` other than "probability" restores that norm instead of
            dividing by the density (mergekit restores "l1").

    Returns:
        Tensor of that shape, in the narrowest dtype that holds all θ_i exactly.
    """
    return merge_kept(tensors, weights, _kept(told), told, elect=False)


@register_sparse("dare_ties", parameters(rescale=True, normalize=True), seeded=True)
def dare_ties(tensors: Sequence[Tensor], weights: Sequence[float], told: Sparse) -> Pieces:
    """As `dare_linear`, but of the weighted deltas only those count whose sign is that of their sum, as in TIES.

    Args and result as for `dare_linear`; `normalize` (the mean, as TIES takes it) divides by the sum of the weights of
    those that agree.
    """
    return merge_kept(tensors, weights, _kept(told), told, elect=True)
