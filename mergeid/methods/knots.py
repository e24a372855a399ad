"""KnOTS: bring the updates of adapters into one basis before they are merged (Stoica et al. 2025, arXiv:2410.19735)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergeid.methods.matrices import merge_matrices
from mergeid.methods.registry import register_method
from mergeid.methods.sparse import Sparse, parameters
from mergeid.methods.ties import ties

_OWN = [p for p in parameters(rescale=False, normalize=True) if p.name in ("density", "lambda", "normalize")]


@register_method("knots_ties", elementwise=False, weights="free", base=True, parameters=_OWN, options=Sparse)
def knots_ties(tensors: Sequence[Tensor], weights: Sequence[float], told: Sparse) -> Tensor:
    """``θ_0 + λ U Σ Vᵀ`` with ``[τ_1, …, τ_n] = U Σ [V_1ᵀ, …, V_nᵀ]`` and V merged of the V_i as `ties` does it.

    Updates of low rank lie in spaces of their own, where their elements have little to do with each other; U is one
    basis for all of them.

    Args:
        tensors: θ_i, of equal shape; vectors are averaged.
        weights: w_i, of any size.
        told: θ_0, λ, the share of each V_i that is kept, and whether to divide by the weights of those that agree.

    Returns:
        Tensor of that shape, in the narrowest dtype that holds all θ_i exactly.
    """

    def merge(deltas: list[Tensor]) -> Tensor:
        u, s, v = torch.linalg.svd(torch.cat(deltas, 1), full_matrices=False)
        rank = int((s > s[0] * max(v.shape) * torch.finfo(s.dtype).eps).sum())
        parts = [part.contiguous() for part in v[:rank].chunk(len(deltas), 1)]
        merged = ties(parts, weights, base=torch.zeros_like(parts[0]), density=told.density, normalize=told.normalize)
        answer: Tensor = (u[:, :rank] * s[:rank]) @ merged.to(u.dtype)
        return answer

    return merge_matrices(tensors, told.base, told.scale, merge)
