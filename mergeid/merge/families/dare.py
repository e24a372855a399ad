"""DARE: drop most of what a fine-tune changed, at random, and rescale the rest (Yu et al. 2024, arXiv:2311.03099)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergeid.merge.families.task_arithmetic import LAMBDA, wide
from mergeid.merge.families.ties import elect_and_merge
from mergeid.merge.methods import Parameter, register_method

_PARAMETERS = (
    Parameter("density", 1.0, 0.0, 1.0, per_model=True, help="share of each task vector that is kept"),
    LAMBDA,
    Parameter("rescale", True, help="divide what is kept by the density"),
)


def drop(delta: Tensor, density: float, rescale: bool, generator: torch.Generator) -> Tensor:
    """``m ⊙ delta / density`` with m Bernoulli(density), in place; the expectation is `delta` (without `rescale`:
    density · delta)."""
    keep = torch.rand(delta.shape, generator=generator) < density
    delta.mul_(keep)
    return delta.div_(density) if rescale and density > 0 else delta


def _weighted_parts(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    origin: Tensor,
    density: Sequence[float],
    rescale: bool,
    generator: torch.Generator,
) -> list[Tensor]:
    return [
        drop(tensor.to(origin.dtype) - origin, share, rescale, generator).mul_(weight)
        for tensor, share, weight in zip(tensors, density, weights, strict=True)
    ]


@register_method("dare_linear", elementwise=False, weights="free", base=True, parameters=[*_PARAMETERS], seeded=True)
def dare_linear(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    base: Tensor,
    density: Sequence[float],
    generator: torch.Generator,
    scale: float = 1.0,
    rescale: bool = True,
) -> Tensor:
    """``θ_0 + λ Σ_i w_i (m_i ⊙ (θ_i − θ_0)) / density_i``, m_i Bernoulli(density_i) per element.

    Args:
        tensors: θ_i, of equal shape.
        weights: w_i, of any size.
        base: θ_0.
        density: chance to keep an element, one per model.
        generator: of the masks, drawn model by model; seeded by the tensor's name, so that the order in which tensors
            are merged does not matter.
        scale: λ.
        rescale: divide by the density.

    Returns:
        Tensor of that shape, in the narrowest dtype that holds all θ_i exactly.
    """
    dtype, to = wide(tensors)
    origin = base.to(to)
    parts = _weighted_parts(tensors, weights, origin, density, rescale, generator)
    total = parts[0]
    for part in parts[1:]:
        total.add_(part)
    return total.mul_(scale).add_(origin).to(dtype)


@register_method(
    "dare_ties",
    elementwise=False,
    weights="free",
    base=True,
    parameters=[*_PARAMETERS, Parameter("normalize", True, help="divide by the weights of those that agree")],
    seeded=True,
)
def dare_ties(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    base: Tensor,
    density: Sequence[float],
    generator: torch.Generator,
    scale: float = 1.0,
    rescale: bool = True,
    normalize: bool = True,
) -> Tensor:
    """As `dare_linear`, but of the weighted deltas only those count whose sign is that of their sum, as in TIES.

    Args and result as for `dare_linear`; `normalize` (the mean, as TIES takes it) divides by the sum of the weights of
    those that agree.
    """
    dtype, to = wide(tensors)
    origin = base.to(to)
    parts = _weighted_parts(tensors, weights, origin, density, rescale, generator)
    return elect_and_merge(parts, weights, normalize).mul_(scale).add_(origin).to(dtype)
