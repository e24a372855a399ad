"""Weights that a network computes from its parameters: standardised kernels, weight norm, gains around 1.

There is no closed form for the parameters, but the error is still a quadratic form of the weight, known from its
moments alone; so it is descended in the parameters, without another look at the data.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergeid.repair.channels import ChannelMoments
from mergeid.repair.closed_form import NOTHING, RIDGES, Fit, Moments, error

if TYPE_CHECKING:
    from mergeid.repair.layers import Part

STEPS = 60


def fit_derived(seen: Moments | ChannelMoments, unseen: Moments | ChannelMoments, part: Part) -> Fit:
    """The parameters (and bias) that answer best, as `mergeid.repair.closed_form.fit` finds weights.

    The ridges are tried from the strongest on, each from where the last one ended."""
    assert part.derived is not None
    start = {k: v.detach().double() for k, v in part.derived.leaves.items()}
    mean = part.matrix.detach().double()
    bias = None if part.offset is None else part.offset.detach().double()
    before = _error(unseen, mean, bias)
    best, lowest, ridge = None, before, inf
    values = start
    for strength in reversed(RIDGES):
        values, shift = _descend(seen, part, values, mean, strength, bias is not None)
        found = _error(unseen, part.remade(values), shift)
        if found < lowest - NOTHING:
            best, lowest, ridge = (values, shift), found, strength
    if best is None:
        return Fit(mean, bias, inf, before, before, start)
    values, shift = _descend(_together(seen, unseen), part, best[0], mean, ridge, bias is not None)
    return Fit(part.remade(values), shift, ridge, before, lowest, values)


def _together(seen: Moments | ChannelMoments, unseen: Moments | ChannelMoments) -> Moments | ChannelMoments:
    if isinstance(seen, Moments) and isinstance(unseen, Moments):
        return seen + unseen
    assert isinstance(seen, ChannelMoments) and isinstance(unseen, ChannelMoments)
    return seen + unseen


def _error(moments: Moments | ChannelMoments, weight: Tensor, bias: Tensor | None) -> float:
    return error(moments, weight, bias) if isinstance(moments, Moments) else moments.error(weight, bias)


def _descend(
    moments: Moments | ChannelMoments,
    part: Part,
    start: dict[str, Tensor],
    mean: Tensor,
    ridge: float,
    shifted: bool,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """L-BFGS on the mean squared error plus the ridge; the bias has a closed form given the weight."""
    if isinstance(moments, Moments):
        second = moments.about(shifted)
        xx, xy, x, y = second.xx, second.xy, second.x, second.y
        strength, scale = ridge * float(xx.trace()) / len(xx), max(second.yy, 1e-300)
    else:
        n = max(moments.count, 1)
        x, y = moments.x / n, moments.y / n
        xx, xy = moments.xx / n, moments.xy / n
        if shifted:
            xx, xy = (xx - x.square()).clamp(min=0), xy - x * y
        strength, scale = ridge * float(xx.mean()), max(float((moments.yy / n).sum()), 1e-300)
    # in the order of memory, which the weights' own strides refer to
    flat = {k: v.as_strided((v.numel(),), (1,)).clone().requires_grad_() for k, v in start.items()}

    def values() -> dict[str, Tensor]:
        return {k: flat[k].as_strided(v.shape, v.stride()) for k, v in start.items()}

    optimiser = torch.optim.LBFGS(
        list(flat.values()), max_iter=STEPS, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-12
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        w = part.remade(values())
        quadratic = (w @ xx) * w - 2 * xy.T * w if w.dim() == 2 else xx * w.square() - 2 * xy * w
        loss = (quadratic.sum() + strength * (w - mean).square().sum()) / scale
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    found = {k: v.detach() for k, v in values().items()}
    w = part.remade(found)
    if not shifted:
        return found, None
    return found, y - (w @ x if w.dim() == 2 else w * x)
