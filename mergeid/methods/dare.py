"""DARE: drop most of what a fine-tune changed, at random, and rescale the rest (Yu et al. 2024, arXiv:2311.03099)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mergeid.methods.registry import Parameter, register_method
from mergeid.methods.task_arithmetic import CHUNK, LAMBDA, in_pieces, wide
from mergeid.methods.ties import elect_and_merge

_PARAMETERS = (
    Parameter("density", 1.0, 0.0, 1.0, per_model=True, help="share of each task vector that is kept"),
    LAMBDA,
    Parameter("rescale", True, help="divide what is kept by the density"),
)


def draw_masks(shape: torch.Size, density: Sequence[float], generator: torch.Generator) -> list[Tensor]:
    """Which elements of each model are kept: one flat bool tensor per model, Bernoulli(density) each."""
    masks = []
    for share in density:
        mask = torch.empty(shape.numel(), dtype=torch.bool)
        for piece in mask.split(CHUNK):
            piece.copy_(torch.rand(len(piece), generator=generator) < share)
        masks.append(mask)
    return masks


def _merge(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor,
    density: Sequence[float],
    generator: torch.Generator,
    rescale: bool,
    together: Callable[[list[Tensor]], Tensor],
) -> Tensor:
    """The base plus what `together` makes of the weighted deltas that are kept, piece by piece."""
    dtype, to = wide(tensors)
    masks = draw_masks(base.shape, density, generator)
    factors = [w / d if rescale and d > 0 else w for w, d in zip(weights, density, strict=True)]

    def merge(place: slice, pieces: list[Tensor]) -> Tensor:
        origin = pieces[-1].to(to)
        deltas = [piece.to(to) - origin for piece in pieces[:-1]]
        parts = [d.mul_(mask[place]).mul_(f) for d, mask, f in zip(deltas, masks, factors, strict=True)]
        return together(parts).add_(origin)

    return in_pieces([*tensors, base], dtype, merge)


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

    def together(parts: list[Tensor]) -> Tensor:
        return functools.reduce(torch.Tensor.add_, parts).mul_(scale)

    return _merge(tensors, weights, base, density, generator, rescale, together)


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

    def together(parts: list[Tensor]) -> Tensor:
        return elect_and_merge(parts, weights, normalize).mul_(scale)

    return _merge(tensors, weights, base, density, generator, rescale, together)
