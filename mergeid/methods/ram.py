"""Reinforced Agent Merging: what one model alone changed stays whole, what several changed is averaged
(arXiv:2601.13572)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergeid.methods.pieces import Pieces, added_up, in_pieces
from mergeid.methods.registry import Parameter, register_method
from mergeid.methods.task_arithmetic import wide

EPSILON = Parameter("epsilon", 1e-5, 0.0, help="changes up to this size are ignored")
SMALLEST = 1e-5
"""The least number of own changes that the share of shared ones is taken of."""


@register_method("ram", elementwise=False, weights="ignored", base=True, shows=True, parameters=[EPSILON])
def ram(tensors: Sequence[Tensor], weights: Sequence[float], *, base: Tensor, epsilon: float = 1e-5) -> Pieces:
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
    shows=True,
    weights="ignored",
    base=True,
    parameters=[
        EPSILON,
        Parameter("r", 0.1, help="how much a model's own changes are amplified"),
        Parameter("alpha", 0.2, 0.0, help="upper limit on the ratio of shared to own changes"),
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
) -> Pieces:
    """As `ram`, with what model i alone changed times ``1 + r · min(ρ_i, α)``, ρ_i the number of elements that it
    changed together with others over the number that it changed alone, in this tensor.

    Args:
        tensors, weights, base, epsilon: as for `ram`.
        r: how much a model's own changes are amplified.
        alpha: α.

    Returns:
        Tensor of that shape, in the narrowest dtype that holds all θ_i exactly.
    """
    to = wide(tensors)[1]

    def counts(_: slice, pieces: list[Tensor]) -> list[Tensor]:
        origin = pieces[-1].to(to)
        changed = torch.stack([(piece.to(to) - origin).abs() > epsilon for piece in pieces[:-1]])
        count = changed.sum(0)
        return [*(changed & (count > 1)).sum(1), *(changed & (count == 1)).sum(1)]

    found = added_up([*tensors, base], counts)
    shared, own = found.reshape(2, -1) if len(found) else torch.zeros(2, len(tensors))
    gains = 1 + r * (shared / own.clamp(min=SMALLEST)).clamp(0, alpha)
    return _merge(tensors, base, epsilon, gains.tolist())


def _merge(tensors: Sequence[Tensor], base: Tensor, epsilon: float, gains: Sequence[float]) -> Pieces:
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
