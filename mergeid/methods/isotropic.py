"""Isotropic merging: every direction of the merged task vector as strong as the others (Marczak et al. 2025,
arXiv:2502.04959)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergeid.methods.matrices import merge_matrices, nearest_orthogonal
from mergeid.methods.registry import Parameter, register_method
from mergeid.methods.task_arithmetic import LAMBDA


@register_method("iso_c", elementwise=False, weights="ignored", base=True, parameters=[LAMBDA])
def iso_c(tensors: Sequence[Tensor], weights: Sequence[float], *, base: Tensor, scale: float = 1.0) -> Tensor:
    """``θ_0 + λ σ̄ U Vᵀ`` for ``Σ_i τ_i = U diag(σ) Vᵀ``, σ̄ the mean of σ.

    Args:
        tensors: θ_i, of equal shape; vectors are averaged.
        weights: not looked at.
        base: θ_0.
        scale: λ.

    Returns:
        Tensor of that shape, in the narrowest dtype that holds all θ_i exactly.
    """

    def merge(deltas: list[Tensor]) -> Tensor:
        u, s, v = torch.linalg.svd(torch.stack(deltas).sum(0), full_matrices=False)
        answer: Tensor = s.mean() * (u @ v)
        return answer

    return merge_matrices(tensors, base, scale, merge)


@register_method(
    "iso_cts",
    elementwise=False,
    weights="ignored",
    base=True,
    parameters=[LAMBDA, Parameter("common_fraction", 0.8, 0.0, 1.0, help="share of the directions that tasks share")],
)
def iso_cts(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    base: Tensor,
    scale: float = 1.0,
    common_fraction: float = 0.8,
) -> Tensor:
    """As `iso_c`, with some directions of each task's own: of ``Σ_i τ_i`` the first k directions U_c, V_c; of each
    ``τ_i − U_c U_cᵀ τ_i`` the first s, with k + T s = rank; all side by side, brought to the nearest orthonormal ones,
    at their mean strength.

    Args:
        tensors, weights, base, scale: as for `iso_c`.
        common_fraction: k / rank, rounded so that what is left is shared out evenly.

    Returns:
        Tensor of that shape, in the narrowest dtype that holds all θ_i exactly.
    """

    def merge(deltas: list[Tensor]) -> Tensor:
        u, s, v = torch.linalg.svd(torch.stack(deltas).sum(0), full_matrices=False)
        rank, tasks = len(s), len(deltas)
        each = min(round((rank - int(rank * common_fraction)) / tasks), rank // tasks)
        common = rank - each * tasks
        shared = u[:, :common]
        lefts, strengths, rights = [shared], [s[:common]], [v[:common]]
        for delta in deltas if each else ():
            p, t, q = torch.linalg.svd(delta - shared @ (shared.T @ delta), full_matrices=False)
            lefts.append(p[:, :each])
            strengths.append(t[:each])
            rights.append(q[:each])
        left, right = nearest_orthogonal(torch.cat(lefts, 1)), nearest_orthogonal(torch.cat(rights, 0))
        return torch.cat(strengths).mean() * (left @ right)

    return merge_matrices(tensors, base, scale, merge)
