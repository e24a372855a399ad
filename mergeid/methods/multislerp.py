"""Multi-SLERP: the mean direction of several models or task vectors, at their mean length (Goddard 2025)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergeid.methods.pieces import Pieces, as_it_is
from mergeid.methods.registry import Parameter, register_method
from mergeid.methods.spherical import combination, products
from mergeid.methods.task_arithmetic import NEARLY_ZERO, wide


@register_method(
    "multislerp",
    elementwise=False,
    weights="free",
    base="optional",
    shows=True,
    parameters=[
        Parameter("normalize_weights", True, help="scale the weights to sum 1"),
        Parameter("eps", 1e-8, 0.0, help="length below which a vector, or the mean, counts as zero"),
    ],
)
def multislerp(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    base: Tensor | None = None,
    normalize_weights: bool = True,
    eps: float = 1e-8,
) -> Pieces:
    """``Σ_i w_i ‖x_i‖ · u``, u the direction of ``Σ_i w_i x_i / ‖x_i‖``; x the models or, with a base, what they add.

    Interpolation in the tangent space at that mean, as the method is described, adds nothing to it: the weighted
    tangent vectors sum to 0 there by definition. Where the mean vanishes, the straight weighted sum is taken.

    Args:
        tensors: θ_i, of equal shape.
        weights: w_i, of any size.
        base: θ_0.
        normalize_weights: scale the weights to sum 1.
        eps: added to lengths before division.

    Returns:
        Tensor of that shape, in the narrowest dtype that holds all θ_i exactly.
    """
    if len(tensors) == 1 or (base is None and all(torch.equal(tensors[0], t) for t in tensors)):
        return as_it_is(tensors[0], wide(tensors)[0])
    shares = torch.tensor(weights, dtype=torch.float64)
    if normalize_weights and abs(math.fsum(weights)) > NEARLY_ZERO:
        shares /= math.fsum(weights)
    found = products(tensors, base)
    lengths = found.diagonal().sqrt()
    factors = shares / (lengths + eps)
    mean = math.sqrt(max(float(factors @ found @ factors), 0.0))
    factors = shares if mean < eps else factors * float(shares @ lengths) / mean
    return combination(tensors, factors.tolist(), base)
