"""Task vectors of which only a part is kept: what DARE, DELLA and Model Breadcrumbs have in common.

A method says which elements of each task vector τ_i = θ_i − θ_0 stay; here they are rescaled, weighted, put together
(summed, or with signs elected as in TIES) and added to the base, piece by piece.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergeid.methods import task_arithmetic
from mergeid.methods.registry import MethodFunction, Parameter, register_method
from mergeid.methods.task_arithmetic import LAMBDA, NEARLY_ZERO, in_pieces, wide

NORMS = ("probability", "l1", "l2", "linf")
SMALLEST_NORM = 1e-7
"""Below this length nothing is rescaled (the bound that mergekit has)."""


def parameters(*own: Parameter, rescale: bool, norm: str = "probability", normalize: bool) -> list[Parameter]:
    """The parameters of such a method: its own, and those of all with this one's defaults."""
    return [
        Parameter("density", 1.0, 0.0, 1.0, per_model=True, help="share of each task vector that is kept"),
        *own,
        LAMBDA,
        Parameter("rescale", rescale, help="make up for what is dropped"),
        Parameter("rescale_norm", norm, choices=NORMS, help="what stays equal: the expectation, or this norm"),
        Parameter("normalize", normalize, help="divide by the sum of the weights (of those that agree)"),
    ]


@dataclass(frozen=True)
class Sparse:
    """What such a method is told besides tensors and weights.

    Attributes:
        base: θ_0.
        density: share to keep, one per model.
        generator: of random masks, seeded by the tensor's name; drawn from model by model.
        scale: λ, factor of the merged task vector.
        rescale: make up for what is dropped.
        rescale_norm: "probability": divide by the chance of being kept, so that the expectation stays; "l1", "l2",
            "linf": scale each task vector back to the norm it had.
        normalize: divide by Σ w_i (of those whose sign won, where signs are elected).
    """

    base: Tensor
    density: Sequence[float]
    generator: torch.Generator | None = None
    scale: float = 1.0
    rescale: bool = True
    rescale_norm: str = "probability"
    normalize: bool = False


def register_sparse(
    name: str, parameters: Sequence[Parameter], told: type[Sparse] = Sparse, *, seeded: bool = False
) -> Callable[[MethodFunction], MethodFunction]:
    """Decorator: register such a method, told what it is told in `told`. `seeded`: it drops at random."""
    return register_method(
        name, elementwise=False, weights="free", base=True, parameters=parameters, seeded=seeded, options=told
    )


@dataclass(frozen=True)
class Kept:
    """What stays of one task vector.

    Attributes:
        mask: flat bool tensor; None: all of it.
        probability: the chance that an element had to be kept: one number, or a flat tensor.
    """

    mask: Tensor | None = None
    probability: float | Tensor = 1.0


def bernoulli(probability: float | Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    """A flat bool tensor, each element True with its probability, drawn in pieces."""
    mask = torch.empty(size, dtype=torch.bool)
    for place in _places(size):
        chance = probability[place] if isinstance(probability, Tensor) else probability
        mask[place] = torch.rand(place.stop - place.start, generator=generator) < chance
    return mask


def merge_kept(
    tensors: Sequence[Tensor], weights: Sequence[float], kept: Sequence[Kept], told: Sparse, elect: bool
) -> Tensor:
    """``θ_0 + λ Σ_i w_i c_i (m_i ⊙ τ_i)``, c_i the rescaling; with `elect` only of what bears the elected sign."""
    dtype, to = wide(tensors)
    factors = [
        _rescaling(t, told.base, k, told.rescale_norm, to) if told.rescale else 1.0
        for t, k in zip(tensors, kept, strict=True)
    ]
    divisor = math.fsum(weights)
    divide = told.normalize and abs(divisor) > NEARLY_ZERO

    def merge(place: slice, pieces: list[Tensor]) -> Tensor:
        origin = pieces[-1].to(to)
        parts = []
        for piece, weight, keep, factor in zip(pieces[:-1], weights, kept, factors, strict=True):
            part = piece.to(to) - origin
            if keep.mask is not None:
                part.mul_(keep.mask[place])
            if isinstance(factor, Tensor):
                part.mul_(weight).div_(factor[place].to(to))
            else:
                part.mul_(weight * factor)
            parts.append(part)
        if elect:
            return elect_and_merge(parts, weights, told.normalize).mul_(told.scale).add_(origin)
        total = functools.reduce(torch.Tensor.add_, parts)
        return (total.div_(divisor) if divide else total).mul_(told.scale).add_(origin)

    return in_pieces([*tensors, told.base], dtype, merge)


def elect_and_merge(parts: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """Sum of the weighted deltas whose sign is that of their sum, over the sum of their weights with `normalize`."""
    total = parts[0].clone()
    for part in parts[1:]:
        total.add_(part)
    positive = total >= 0
    merged, divisor = torch.zeros_like(total), torch.zeros_like(total)
    for part, weight in zip(parts, weights, strict=True):
        agrees = torch.where(positive, part > 0, part < 0)
        merged.add_(part * agrees)
        divisor.add_(agrees, alpha=weight)
    if normalize:
        merged.div_(torch.where(divisor == 0, torch.ones_like(divisor), divisor))
    return merged


def _rescaling(tensor: Tensor, base: Tensor, kept: Kept, norm: str, to: torch.dtype) -> float | Tensor:
    """The factor of what is kept; a flat tensor holds divisors."""
    if kept.mask is None:
        return 1.0
    if norm == "probability":
        if isinstance(kept.probability, Tensor):
            return kept.probability
        return 1 / kept.probability if kept.probability > 0 else 1.0
    return regained(tensor, base, kept.mask, norm, to)


def regained(tensor: Tensor, base: Tensor, mask: Tensor, norm: str, to: torch.dtype) -> float:
    """‖τ‖ / ‖m ⊙ τ‖ in that norm ("l1", "l2", "linf"); 1 where either is next to nothing."""
    sums = torch.zeros(2, dtype=torch.float64)
    flat, origin = tensor.reshape(-1), base.reshape(-1)
    for place in _places(len(flat)):
        size = (flat[place].to(to) - origin[place].to(to)).abs_().double()
        if norm == "l2":
            size = size.square_()
        for i, part in enumerate((size, size * mask[place])):
            sums[i] = torch.maximum(sums[i], part.max()) if norm == "linf" else sums[i] + part.sum()
    before, after = (sums.sqrt() if norm == "l2" else sums).tolist()
    return 1.0 if min(before, after) < SMALLEST_NORM else float(before / after)


def _places(size: int) -> Iterator[slice]:
    """The pieces in which a flat tensor is worked on."""
    step = task_arithmetic.CHUNK
    return (slice(start, min(start + step, size)) for start in range(0, size, step))
