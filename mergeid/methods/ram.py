"""Reinforced Agent Merging: what one model alone changed stays whole, what several changed is averaged
(arXiv:2601.13572)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergeid.methods import task_arithmetic
from mergeid.methods.registry import Parameter, register_method
from mergeid.methods.task_arithmetic import in_pieces, wide

EPSILON = Parameter("epsilon", 1e-5, 0.0, help="changes up to this size count as none")
SMALLEST = 1e-5
"""The least number of own changes that the share of shared ones is taken of."""


@register_method("ram", weights="ignored", base=True, parameters=[EPSILON])
def ram(tensors: Sequence[Tensor], weights: Sequence[float], *, base: Tensor, epsilon: float = 1e-5) -> Tensor:
    """``θ_0 + Σ_i m_i ⊙ (θ_i − θ_0) / max(Σ_i m_i, 1)``, m_i = |θ_i − θ_0| > ε: the mean of the changes, over those
    models that changed the element.

    Args:
        tensors: θ_i, of equal shape.
        weights: not looked at.
        base: θ_0.
        epsilon: ε, in the weights' own unit.

    Returns:
        Tensor of that shape, in the narrowest dtype that holds all θ_i exactly.
    """
    return _merge(tensors, base, epsilon, [1.0] * len(tensors))


@register_method(
    "ramplus_tl",
    elementwise=False,
    weights="ignored",
    base=True,
    parameters=[
        EPSILON,
        Parameter("r", 0.1, help="how much a model's own changes gain"),
        Parameter("alpha", 0.2, 0.0, help="largest share of shared to own changes that counts"),
    ],
)
def ramplus_tl(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    base: Tensor,
    epsilon: float = 1e-5,
    r: float = 0.1,
    alpha: float = 0.2,
) -> Tensor:
    """As `ram`, with what model i alone changed times ``1 + r · min(ρ_i, α)``, ρ_i the number of elements that it
    changed together with others over the number that it changed alone, in this tensor.

    Args:
        tensors, weights, base, epsilon: as for `ram`.
        r: how much a model's own changes gain.
        alpha: α.

    Returns:
        Tensor of that shape, in the narrowest dtype that holds all θ_i exactly.
    """
    to = wide(tensors)[1]
    shared, own = torch.zeros(2, len(tensors), dtype=torch.float64)
    flat, origin = [t.reshape(-1) for t in tensors], base.reshape(-1)
    for start in range(0, len(origin), task_arithmetic.CHUNK):
        place = slice(start, start + task_arithmetic.CHUNK)
        changed = torch.stack([(t[place].to(to) - origin[place].to(to)).abs() > epsilon for t in flat])
        count = changed.sum(0)
        shared += (changed & (count > 1)).sum(1)
        own += (changed & (count == 1)).sum(1)
    gains = 1 + r * (shared / own.clamp(min=SMALLEST)).clamp(0, alpha)
    return _merge(tensors, base, epsilon, gains.tolist())


def _merge(tensors: Sequence[Tensor], base: Tensor, epsilon: float, gains: Sequence[float]) -> Tensor:
    """The mean over those that changed an element; where it is one alone, times its gain."""
    dtype, to = wide(tensors)

    def merge(_: slice, pieces: list[Tensor]) -> Tensor:
        origin = pieces[-1].to(to)
        deltas = [piece.to(to) - origin for piece in pieces[:-1]]
        changed = [d.abs() > epsilon for d in deltas]
        count = sum(c.to(to) for c in changed)
        assert isinstance(count, Tensor)
        factor = count.clamp(min=1).reciprocal()
        total = torch.zeros_like(origin)
        for delta, mask, gain in zip(deltas, changed, gains, strict=True):
            total.add_(delta.mul_(mask).mul_(torch.where(count == 1, gain * factor, factor)))
        return total.add_(origin)

    return in_pieces([*tensors, base], dtype, merge)
