"""Task vectors as matrices: what the spectral methods have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mergeid.methods.task_arithmetic import wide


def merge_matrices(
    tensors: Sequence[Tensor], base: Tensor, scale: float, merge: Callable[[list[Tensor]], Tensor]
) -> Tensor:
    """``θ_0 + λ M(τ_1, …)`` for tensors with two dimensions or more, their filters unfolded to [out, the rest]; for
    vectors, which have no spectrum, M is the mean.

    Args:
        tensors: θ_i, of equal shape.
        base: θ_0.
        scale: λ.
        merge: M: task vectors [out, in] -> the merged one.
    """
    dtype, to = wide(tensors)
    origin = base.to(to)
    deltas = [t.to(to) - origin for t in tensors]
    if origin.dim() < 2 or origin.numel() == 0:
        merged = torch.stack(deltas).mean(0)
    elif not any(bool(d.any()) for d in deltas):
        merged = torch.zeros_like(origin)
    else:
        merged = merge([d.reshape(len(d), -1) for d in deltas]).reshape(origin.shape)
    return merged.mul_(scale).add_(origin).to(dtype)


def nearest_orthogonal(x: Tensor) -> Tensor:
    """The matrix with orthonormal columns (rows, where they are fewer) that is nearest to x: P Qᵀ of its singular value
    decomposition."""
    p, _, q = torch.linalg.svd(x, full_matrices=False)
    answer: Tensor = p @ q
    return answer
