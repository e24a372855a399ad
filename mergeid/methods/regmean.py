"""RegMean: merge linear layers by regression on their inputs (Jin et al. 2023, arXiv:2212.09849)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergeid.methods.registry import Parameter, linear, register_method
from mergeid.methods.statistics import Gram
from mergeid.methods.task_arithmetic import wide

RELATIVE_FLOOR = 1e-10
"""Directions of the inputs with less than this share of the largest one's energy count as not seen."""


@register_method(
    "regmean",
    elementwise=False,
    statistics="gram",
    parameters=[Parameter("alpha", 0.9, 0.0, 1.0, help="factor of the Gram matrices' off-diagonal entries")],
)
def regmean(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    statistics: Sequence[Gram] | None,
    alpha: float = 0.9,
) -> Tensor:
    """``W = (Σ_i w_i W_i G_i) (Σ_i w_i G_i)⁺``, whose outputs are closest to each model's on its own inputs.

    G_i = X_iᵀX_i is the Gram matrix of the layer's inputs, its off-diagonal entries times `alpha`.

    Args:
        tensors: W_i [out, in], of equal shape.
        weights: w_i.
        statistics: G_i of each model (`mergeid.methods.statistics.gram_matrices`). None (everything but weights of
            linear layers): the plain weighted average.
        alpha: 1 is the exact regression, less of it is steadier (the paper's choice is about 0.9).

    Returns:
        Tensor of that shape, in the narrowest dtype that holds all W_i exactly.
    """
    if statistics is None:
        return linear(tensors, weights)
    dtype, _ = wide(tensors)
    transposed = statistics[0].axis == 0
    matrices = [t.double().T if transposed else t.double() for t in tensors]
    average = linear(matrices, weights)
    left, right = torch.zeros_like(average), torch.zeros_like(statistics[0].matrix)
    for matrix, weight, gram in zip(matrices, weights, statistics, strict=True):
        g = gram.matrix * alpha + torch.diag(torch.diagonal(gram.matrix)) * (1 - alpha)
        left += weight * (matrix @ g)
        right += weight * g
    # Solved for the way from the average: what no input shows stays averaged.
    merged = average + solve(right, (left - average @ right).T).T
    return (merged.T if transposed else merged).to(dtype)


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix⁺ right`` for a symmetric positive semi-definite matrix, float64 [n, n] and [n, m]."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    diagonal = torch.diagonal(factor)
    if not failed and diagonal.min() ** 2 > RELATIVE_FLOOR * diagonal.max() ** 2:
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(matrix)
    seen = values > RELATIVE_FLOOR * values.abs().max()
    inverse = torch.where(seen, 1 / torch.where(seen, values, torch.ones_like(values)), torch.zeros_like(values))
    answer: Tensor = vectors @ (inverse[:, None] * (vectors.T @ right))
    return answer
