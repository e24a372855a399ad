"""WUDI: the merged task vector that acts as each task's own does on that task's inputs, for which its own rows stand
(Cheng et al. 2025, arXiv:2503.08099)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergeid.methods.matrices import merge_matrices
from mergeid.methods.registry import register_method
from mergeid.methods.task_arithmetic import LAMBDA


@register_method("wudi", elementwise=False, weights="ignored", base=True, parameters=[LAMBDA])
def wudi(tensors: Sequence[Tensor], weights: Sequence[float], *, base: Tensor, scale: float = 1.0) -> Tensor:
    """``θ_0 + λ τ`` with τ the minimiser of ``Σ_i ‖(τ − τ_i) τ_iᵀ‖² / ‖τ_i‖²`` that is nearest to ``Σ_i τ_i``.

    The update of a linear layer is made of its inputs, so that its rows span them: this is RegMean without data. The
    paper goes there by gradient descent from ``Σ_i τ_i``; this is where that ends, in closed form:
    ``τ = S + (Σ_i (τ_i − S) G_i) (Σ_i G_i)⁺`` with ``S = Σ_i τ_i``, ``G_i = τ_iᵀ τ_i / ‖τ_i‖²``.

    Args and result as for `mergeid.methods.isotropic.iso_c`.
    """

    def merge(deltas: list[Tensor]) -> Tensor:
        moved = [d for d in deltas if bool(d.any())]
        start = torch.stack(moved).sum(0)
        units = [d / d.norm() for d in moved]
        right = torch.stack([(d - start) @ u.T @ u for d, u in zip(moved, units, strict=True)]).sum(0)
        # The pseudo-inverse of Σ G_i from the stacked rows, whose singular values are the roots of its eigenvalues.
        _, s, v = torch.linalg.svd(torch.cat(units), full_matrices=False)
        kept = s > s[0] * max(v.shape) * torch.finfo(s.dtype).eps
        v, s = v[kept], s[kept]
        answer: Tensor = start + ((right @ v.T) / s.square()) @ v
        return answer

    return merge_matrices(tensors, base, scale, merge)
