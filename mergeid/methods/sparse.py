"""Task vectors of which only a part is kept: what DARE, DELLA and Model Breadcrumbs have in common.

A method says which elements of each task vector τ_i = θ_i − θ_0 stay; here they are rescaled, weighted, put together
(summed, or with signs elected as in TIES) and added to the base, piece by piece.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mergeid.methods.pieces import HALF, Pieces, places
from mergeid.methods.registry import MethodFunction, Parameter, register_method
from mergeid.methods.task_arithmetic import LAMBDA, NEARLY_ZERO, wide

NORMS = ("probability", "l1", "l2", "linf")
SMALLEST_NORM = 1e-7
"""Below this length nothing is rescaled (the bound that mergekit has)."""


def parameters(*own: Parameter, rescale: bool, norm: str = "probability", normalize: bool) -> list[Parameter]:
    """The parameters of such a method: its own, and those of all with this one's defaults."""
    return [
        Parameter("density", 1.0, 0.0, 1.0, per_model=True, help="share of each task vector that is kept"),
        *own,
        LAMBDA,
        Parameter("rescale", rescale, help="rescale to make up for what is dropped"),
        Parameter(
            "rescale_norm", norm, choices=NORMS, help="what the rescaling preserves: the expectation, or this norm"
        ),
        Parameter("normalize", normalize, help="divide by the sum of the weights (of those that agree)"),
    ]


@dataclass(frozen=True)
class Sparse:
    """What such a method is told besides tensors and weights.

    Attributes:
        base: θ_0.
        density: share to keep, one per model.
        generator: of random masks, seeded by the tensor's name; gives every model's mask its seed.
        scale: λ, factor of the merged task vector.
        rescale: rescale to make up for what is dropped.
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
) -> Callable[[MethodFunction], Callable[..., Tensor]]:
    """Decorator: register such a method, told what it is told in `told`. `seeded`: it drops at random."""
    return register_method(
        name,
        elementwise=False,
        weights="free",
        base=True,
        parameters=parameters,
        seeded=seeded,
        options=told,
        shows=True,
    )


Selects = Callable[[slice, Tensor], Tensor]
"""(place of a piece, the task vector's piece) -> float tensor: 0 for what is dropped there, else 1 (or its chance)."""


@dataclass(frozen=True)
class Kept:
    """What stays of one task vector.

    Attributes:
        begin: gives what selects, piece by piece from the first to the last; None: all of it stays.
        probability: the chance that an element had to be kept; None: it depends on the element, and what selects gives
            it.
    """

    begin: Callable[[], Selects] | None = None
    probability: float | None = 1.0


NOTHING = Kept(lambda: lambda place, delta: torch.zeros_like(delta), 0.0)
"""Nothing stays."""


class Uniform:
    """Numbers in [0, 1) for the elements of one task vector, the same ones at every reading.

    Args:
        generator: of the tensor; drawn from once.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        self.seed = int(torch.randint(1 << 62, (), generator=generator))

    def begin(self) -> Callable[[int], Tensor]:
        """What draws so many, float32, from the first element on: 24 bits each, two from every draw of SFC64, which is
        several times as fast as torch and the same everywhere."""
        bits, spare = np.random.SFC64(self.seed), np.empty(0, np.uint32)

        def draw(count: int) -> Tensor:
            nonlocal spare
            found = bits.random_raw(max(0, count - len(spare) + 1) // 2).astype("<u8", copy=False).view("<u4")
            found = np.concatenate([spare, found]) if len(spare) else found
            found, spare = found[:count], found[count:].copy()
            return torch.from_numpy(np.multiply(found >> 8, np.float32(2.0**-24), dtype=np.float32, casting="unsafe"))

        return draw


def at_random(probability: float, generator: torch.Generator | None) -> Kept:
    """Each element with the same chance."""
    if probability >= 1:
        return Kept()
    numbers = Uniform(generator)

    def begin() -> Selects:
        draw = numbers.begin()

        def select(_: slice, delta: Tensor) -> Tensor:
            numbers = draw(len(delta))
            return torch.lt(numbers, probability, out=numbers)

        return select

    return Kept(begin, probability)


def merge_kept(
    tensors: Sequence[Tensor], weights: Sequence[float], kept: Sequence[Kept], told: Sparse, elect: bool, step: int = 0
) -> Pieces:
    """``θ_0 + λ Σ_i w_i c_i (m_i ⊙ τ_i)``, c_i the rescaling; with `elect` only of what bears the elected sign.

    Args:
        step: elements of a piece, where what selects wants whole rows.
    """
    dtype, to = wide(tensors)
    factors = [
        _rescaling((t, told.base), k, told.rescale_norm, to, step) if told.rescale else 1.0
        for t, k in zip(tensors, kept, strict=True)
    ]
    divisor = math.fsum(weights)
    divide = told.normalize and abs(divisor) > NEARLY_ZERO

    def parts() -> Iterator[Tensor]:
        selects = [k.begin() if k.begin is not None else None for k in kept]
        flat = [t.reshape(-1) for t in (*tensors, told.base)]
        for place in places(len(flat[-1]), step or HALF):
            origin = flat[-1][place].to(to)
            found = []
            for tensor, weight, select, factor, keep in zip(flat[:-1], weights, selects, factors, kept, strict=True):
                part = tensor[place].to(to, copy=True).sub_(origin)
                if select is not None:
                    chosen = select(place, part)
                    if factor is None:
                        part.div_((chosen + (chosen == 0)).to(to))
                    part.mul_(chosen if keep.probability is not None else chosen != 0)
                found.append(part.mul_(weight * (1.0 if factor is None else factor)))
            if elect:
                merged = elect_and_merge(found, weights, told.normalize)
            else:
                merged = functools.reduce(torch.Tensor.add_, found)
                merged = merged.div_(divisor) if divide else merged
            yield merged.mul_(told.scale).add_(origin).to(dtype)

    return Pieces(tensors[0].shape, dtype, parts)


def elect_and_merge(parts: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """Sum of the weighted deltas whose sign is that of their sum (zero counts as positive), over the sum of their
    weights with `normalize`. The deltas are used up."""
    total = parts[0].clone()
    for part in parts[1:]:
        total.add_(part)
    ones = torch.ones_like(total)
    sign = torch.copysign(ones, total, out=total)  # of -0.0 too: nothing agrees there
    merged, divisor, agrees = ones.zero_(), torch.zeros_like(total), torch.empty_like(total)
    for part, weight in zip(parts, weights, strict=True):
        merged.add_(part.mul_(sign).clamp_(min=0))
        if normalize:
            divisor.add_(torch.gt(part, 0, out=agrees), alpha=weight)
    if normalize:
        merged.div_(divisor.add_(torch.eq(divisor, 0, out=agrees)))
    return merged.mul_(sign)


def _rescaling(pair: tuple[Tensor, Tensor], kept: Kept, norm: str, to: torch.dtype, step: int) -> float | None:
    """The factor of what is kept; None: every element is divided by its own chance."""
    if kept.begin is None:
        return 1.0
    if norm == "probability":
        chance = kept.probability
        return None if chance is None else 1 / chance if chance > 0 else 1.0
    return regained(pair, kept.begin(), norm, to, step)


def regained(pair: tuple[Tensor, Tensor], select: Selects, norm: str, to: torch.dtype, step: int = 0) -> float:
    """‖τ‖ / ‖m ⊙ τ‖ in that norm ("l1", "l2", "linf"); 1 where either is next to nothing.

    Args:
        pair: θ and θ_0, τ = θ − θ_0.
        select: m, from the first piece to the last.
        step: elements of a piece; 0: the usual number.
    """
    flat, origin = (t.reshape(-1) for t in pair)
    sums = torch.zeros(2, dtype=torch.float64)
    for place in places(len(flat), step or HALF):
        delta = flat[place].to(to, copy=True).sub_(origin[place].to(to))
        chosen = select(place, delta) != 0
        size = delta.abs_().to(torch.float64)
        if norm == "l2":
            size = size.square_()
        both = (size, size * chosen)
        if norm == "linf":
            sums = torch.maximum(sums, torch.stack([part.max() for part in both]))
        else:
            sums += torch.stack([part.sum() for part in both])
    before, after = (sums.sqrt() if norm == "l2" else sums).tolist()
    return 1.0 if min(before, after) < SMALLEST_NORM else float(before / after)
