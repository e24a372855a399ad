"""Task singular vectors: keep each task's strongest directions, and take away what they share (Gargiulo et al. 2025,
arXiv:2412.00081)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergeid.methods.matrices import merge_matrices, nearest_orthogonal
from mergeid.methods.registry import register_method
from mergeid.methods.task_arithmetic import LAMBDA


@register_method("tsv", elementwise=False, weights="ignored", base=True, parameters=[LAMBDA])
def tsv(tensors: Sequence[Tensor], weights: Sequence[float], *, base: Tensor, scale: float = 1.0) -> Tensor:
    """``θ_0 + λ Û diag(σ) V̂ᵀ``: of each of the T task vectors τ_i = U_i Σ_i V_iᵀ the ⌊rank / T⌋ strongest directions,
    side by side as U, σ, V, and Û, V̂ the nearest matrices with orthonormal columns, so that tasks do not interfere.

    Args and result as for `mergeid.methods.isotropic.iso_c`.
    """

    def merge(deltas: list[Tensor]) -> Tensor:
        kept = max(1, min(deltas[0].shape) // len(deltas))
        parts = [torch.linalg.svd(d, full_matrices=False) for d in deltas]
        left = nearest_orthogonal(torch.cat([u[:, :kept] for u, _, _ in parts], 1))
        right = nearest_orthogonal(torch.cat([v[:kept] for _, _, v in parts], 0))
        return left * torch.cat([s[:kept] for _, s, _ in parts]) @ right

    return merge_matrices(tensors, base, scale, merge)
