"""The weights of one layer that answer its inputs as the models do, in closed form.

With X [n, d] the inputs of a layer in the merged network, Y [n, m] what the models answer at the same place (averaged),
and W̄ [m, d], b̄ the aligned average,

    W, b = argmin ‖X Wᵀ + 1 bᵀ - Y‖² + λ n ‖W - W̄‖²,        λ = ρ tr(G) / d,  G = XᵀX / n (centred with a bias),

which needs the moments of X and Y alone:  Wᵀ = (G + λ)⁻¹ (C + λ W̄ᵀ),  C = XᵀY / n,  b = ȳ - W x̄. Without a bias nothing
is centred. ρ is chosen on moments of examples that the fit has not seen; ρ = ∞ leaves the average.

Related: RegMean (Jin et al. 2023, arXiv:2212.09849) fits each model's own inputs, RegMean++ (arXiv:2508.03121) those of
the merged network, both for fine-tunes of one base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf

import torch
from torch import Tensor

CHUNK = 2048
"""Rows whose products are added up before float64 takes over."""
NOTHING = 1e-9
"""Error, over the targets' spread, that a fit must save on unseen rows: less is rounding."""
CHOOSING = 256
"""Outputs of a layer that the ridge is chosen on at most."""
RISES = 2
"""After so many ridges in a row that are worse than the one before, no stronger one is tried."""
RIDGES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


@dataclass
class Moments:
    """Sums over rows, float64, of inputs x [d] and targets y [m], about fixed shifts that the first rows give.

    Attributes:
        xx: Σ x xᵀ [d, d]; xy: Σ x yᵀ [d, m]; yy: Σ |y|²; x: Σ x; y: Σ y (all about the shifts).
    """

    d: int
    m: int
    count: int = 0
    shift: tuple[Tensor, Tensor] | None = None
    xx: Tensor = field(init=False)
    xy: Tensor = field(init=False)
    x: Tensor = field(init=False)
    y: Tensor = field(init=False)
    yy: float = 0.0

    def __post_init__(self) -> None:
        self.xx, self.xy = _zeros(self.d, self.d), _zeros(self.d, self.m)
        self.x, self.y = _zeros(self.d), _zeros(self.m)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows [n, d] and [n, m], of any float type."""
        if not len(x):
            return
        if self.shift is None:
            self.xx, self.xy, self.x, self.y = (t.to(x.device) for t in (self.xx, self.xy, self.x, self.y))
            self.shift = (x.mean(0, dtype=torch.float64), y.mean(0, dtype=torch.float64))
        wide = x.dtype == torch.float64
        for a, b in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            u, v = a - self.shift[0].to(a.dtype), b - self.shift[1].to(b.dtype)
            if not wide:
                u, v = u.float(), v.float()
            self.xx += u.T @ u
            self.xy += u.T @ v
            self.x += u.sum(0, dtype=torch.float64)
            self.y += v.sum(0, dtype=torch.float64)
            self.yy += float(v.double().square().sum())
        self.count += len(x)

    def about(self, centre: bool) -> Second:
        """Second moments per row, about the means (`centre`) or about 0."""
        assert self.shift is not None
        n = float(self.count)
        x, y = self.x / n, self.y / n
        xx, xy = self.xx / n - torch.outer(x, x), self.xy / n - torch.outer(x, y)
        yy = self.yy / n - float(y.square().sum())
        mx, my = self.shift[0].double() + x, self.shift[1].double() + y
        if not centre:
            xx, xy, yy = xx + torch.outer(mx, mx), xy + torch.outer(mx, my), yy + float(my.square().sum())
        return Second(xx, xy, max(yy, 0.0), mx, my)

    def centred(self) -> Moments:
        """Of the rows about their means."""
        second, total = self.about(True), Moments(self.d, self.m, self.count)
        total.x, total.y = torch.zeros_like(self.x), torch.zeros_like(self.y)
        total.shift = (total.x.clone(), total.y.clone())
        total.xx, total.xy, total.yy = self.count * second.xx, self.count * second.xy, self.count * second.yy
        return total

    def __add__(self, other: Moments) -> Moments:
        """Of all rows together."""
        if other.shift is None or self.shift is None:
            return self if other.shift is None else other
        total = Moments(self.d, self.m, self.count + other.count, self.shift)
        dx, dy = (t.double() - s.double() for s, t in zip(self.shift, other.shift, strict=True))
        n = other.count
        total.xx = self.xx + other.xx + torch.outer(dx, other.x) + torch.outer(other.x, dx) + n * torch.outer(dx, dx)
        total.xy = self.xy + other.xy + torch.outer(dx, other.y) + torch.outer(other.x, dy) + n * torch.outer(dx, dy)
        total.x, total.y = self.x + other.x + n * dx, self.y + other.y + n * dy
        total.yy = self.yy + other.yy + 2 * float(dy @ other.y) + n * float(dy.square().sum())
        return total


@dataclass(frozen=True)
class Second:
    """Second moments per row: xx [d, d], xy [d, m], yy; and the means x [d], y [m]."""

    xx: Tensor
    xy: Tensor
    yy: float
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Fit:
    """Attributes:
    weight: float64 [m, d]; bias: float64 [m], or None.
    ridge: ρ; infinite where the average stays.
    before, after: squared error per row on unseen rows, over the targets' spread there, of the average and of the fit.
    leaves: values of the parameters that the weight is computed from, where it is no parameter.
    """

    weight: Tensor
    bias: Tensor | None
    ridge: float
    before: float
    after: float
    leaves: Mapping[str, Tensor] = field(default_factory=dict)


def ridge_solution(moments: Moments, mean: Tensor, ridge: float, *, bias: bool) -> tuple[Tensor, Tensor | None]:
    """W [m, d] and b [m] (None without a bias) for one ρ.

    Args:
        mean: W̄ [m, d], towards which the ridge pulls.
    """
    return _Pulled(moments.about(bias), mean.double(), bias)(ridge)


class _Pulled:
    """The solutions of all ridges ρ -> W, b: about the average, where what is left is small, and so is what rounding
    loses."""

    def __init__(self, second: Second, mean: Tensor, bias: bool) -> None:
        self.second, self.mean, self.bias = second, mean, bias
        self.strength = float(second.xx.trace()) / len(second.xx)
        self.left = second.xy - second.xx @ mean.T

    def __call__(self, ridge: float) -> tuple[Tensor, Tensor | None]:
        weight = self.mean
        if ridge * self.strength > 0:
            system = self.second.xx.clone()
            system.diagonal().add_(ridge * self.strength)
            weight = weight + torch.cholesky_solve(self.left, torch.linalg.cholesky(system, out=system)).T
        return weight, self.second.y - weight @ self.second.x if self.bias else None


def error(moments: Moments, weight: Tensor, bias: Tensor | None) -> float:
    """Mean squared error of a layer per row, over the targets' variance (without a bias: their mean square)."""
    return _error(moments.about(bias is not None), weight.double(), None if bias is None else bias.double())


def _error(second: Second, weight: Tensor, bias: Tensor | None) -> float:
    return max(second.yy + _quadratic(second, weight, bias), 0.0) / max(second.yy, 1e-300)


def _quadratic(second: Second, weight: Tensor, bias: Tensor | None) -> float:
    """Squared error per row but for what does not depend on the layer."""
    value = float(((weight @ second.xx) * weight).sum()) - 2 * float((second.xy * weight.T).sum())
    if bias is not None:
        value += float((weight @ second.x + bias - second.y).square().sum())
    return value


def fit(
    seen: Moments,
    unseen: Moments,
    mean: Tensor,
    mean_bias: Tensor | None,
    *,
    ridges: Sequence[float] = RIDGES,
) -> Fit:
    """The ridge that answers best on unseen rows, then the fit of all rows with it; the average where none is better.

    Args:
        mean, mean_bias: W̄ [m, d] and b̄ [m]; a layer without a bias has none.
    """
    bias = mean_bias is not None
    mean, mean_bias = mean.double(), None if mean_bias is None else mean_bias.double()
    second, judge = seen.about(bias), unseen.about(bias)
    before = _error(judge, mean, mean_bias)
    few = torch.linspace(0, len(mean) - 1, min(len(mean), CHOOSING)).long()
    part, other = _outputs(second, few), _outputs(judge, few)
    best, lowest = inf, _quadratic(other, mean[few], None if mean_bias is None else mean_bias[few])
    least = NOTHING * judge.yy * len(few) / len(mean)
    solution = _Pulled(part, mean[few], bias)
    rises, last = 0, inf
    for ridge in ridges:
        found = _quadratic(other, *solution(ridge))
        if found < lowest - least:
            best, lowest = ridge, found
        rises, last = (rises + 1 if found > last else 0), found
        if rises == RISES and best < inf:
            break
    if best < inf:
        after = _error(judge, *_Pulled(second, mean, bias)(best))
        if after < before - NOTHING:
            weight, b = ridge_solution(seen + unseen, mean, best, bias=bias)
            return Fit(weight, b, best, before, after)
    return Fit(mean, mean_bias, inf, before, before)


def _outputs(second: Second, few: Tensor) -> Second:
    return replace(second, xy=second.xy[:, few], y=second.y[few])
