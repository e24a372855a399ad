"""Scale and shift of single channels in closed form: what a norm can be given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor

from mergeid.repair.closed_form import NOTHING, RIDGES, Fit


def _zeros(m: int) -> Tensor:
    return torch.zeros(m, dtype=torch.float64)


NAMES = ("x", "y", "xx", "xy", "yy")


@dataclass
class ChannelMoments:
    """Sums over rows, float64 [m], of inputs x and targets y that belong to them channel by channel."""

    m: int
    count: int = 0
    x: Tensor = field(init=False)
    y: Tensor = field(init=False)
    xx: Tensor = field(init=False)
    xy: Tensor = field(init=False)
    yy: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.x, self.y, self.xx, self.xy, self.yy = (_zeros(self.m) for _ in range(5))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows [n, m]."""
        u, v = x.double(), y.double()
        for name in NAMES if not self.count else ():
            setattr(self, name, getattr(self, name).to(x.device))
        self.count += len(u)
        self.x += u.sum(0)
        self.y += v.sum(0)
        self.xx += u.square().sum(0)
        self.xy += (u * v).sum(0)
        self.yy += v.square().sum(0)

    def __add__(self, other: ChannelMoments) -> ChannelMoments:
        total = ChannelMoments(self.m, self.count + other.count)
        for name in NAMES:
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def error(self, scale: Tensor, shift: Tensor | None) -> float:
        """Mean squared error over the targets' variance (without a shift: their mean square)."""
        n = max(self.count, 1)
        b = torch.zeros_like(scale) if shift is None else shift
        value = self.yy - 2 * scale * self.xy + scale.square() * self.xx + 2 * b * (scale * self.x - self.y)
        spread = self.yy - (0 if shift is None else self.y.square() / n)
        return max(float((value / n + b.square()).sum()), 0.0) / max(float(spread.sum()) / n, 1e-300)


def channel_solution(
    moments: ChannelMoments, mean: Tensor, ridge: float, *, shifted: bool
) -> tuple[Tensor, Tensor | None]:
    """argmin over scale and shift of Σ (a x + b - y)² + λ n (a - ā)² per channel, λ = ρ mean of the variances of x."""
    n = max(moments.count, 1)
    mx, my = moments.x / n, moments.y / n
    xx, xy = moments.xx / n, moments.xy / n
    if shifted:
        xx, xy = (xx - mx.square()).clamp(min=0), xy - mx * my
    strength = ridge * float(xx.mean())
    scale = (xy + strength * mean) / (xx + strength) if strength > 0 else mean
    return scale, my - scale * mx if shifted else None


def fit_channels(
    seen: ChannelMoments,
    unseen: ChannelMoments,
    mean: Tensor,
    mean_shift: Tensor | None,
    *,
    ridges: Sequence[float] = RIDGES,
) -> Fit:
    """As `mergeid.repair.closed_form.fit`, for scales [m] and shifts [m]."""
    start = mean.double()
    shift = None if mean_shift is None else mean_shift.double()
    before = unseen.error(start, shift)
    best, lowest = inf, before
    for ridge in ridges:
        found = unseen.error(*channel_solution(seen, start, ridge, shifted=shift is not None))
        if found < lowest - NOTHING:
            best, lowest = ridge, found
    if best == inf:
        return Fit(start, shift, inf, before, before)
    scale, b = channel_solution(seen + unseen, start, best, shifted=shift is not None)
    return Fit(scale, b, best, before, lowest)
