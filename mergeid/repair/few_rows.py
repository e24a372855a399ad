"""Rows to fit a layer on: kept as they are while they are fewer than the inputs, added up from then on.

With n rows and d > n inputs, the solution of `mergeid.repair.closed_form` lies in the span of the rows,

    W = W̄ + Rᵀ (X Xᵀ + λ n)⁻¹ X,        R = Y - X W̄ᵀ  (centred with a bias),

so that one eigendecomposition of X Xᵀ [n, n] serves every ridge, and nothing of size d x d is held. Where n is large,
the ridge is chosen on a sample of the outputs instead, by a Cholesky factor for each: that takes less time and memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from mergeid.repair.closed_form import CHOOSING, NOTHING, RIDGES, RISES, Fit, Moments, fit

MANY = 2048
"""Rows from which on there is no eigendecomposition."""
COLUMNS = 1024
"""Inputs that are brought into float64 at a time."""


class Gathered:
    """Inputs x [·, d] and answers y [·, m] of one layer, in the order in which they came."""

    def __init__(self, d: int, m: int) -> None:
        self.d, self.m, self.count = d, m, 0
        self.blocks: list[tuple[Tensor, Tensor]] | None = []
        self._sums = Moments(0, 0)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows [n, d] and [n, m], of any float type."""
        self.count += len(x)
        if self.blocks is None:
            self._sums.add(x, y)
        else:
            self.blocks.append((x, y))
            if self.count > self.d:
                self._sums, self.blocks = _summed(self.blocks, self.d, self.m), None

    @property
    def rows(self) -> tuple[Tensor, Tensor] | None:
        """Inputs [n, d] as they came, and answers [n, m], float64; None where they were added up."""
        if self.blocks is None:
            return None
        x, y = zip(*self.blocks, strict=True) if self.blocks else ((torch.zeros(0, self.d),), (torch.zeros(0, self.m),))
        return x[0] if len(x) == 1 else torch.cat(x), torch.cat(y).double()

    @property
    def moments(self) -> Moments:
        return self._sums if self.blocks is None else _summed(self.blocks, self.d, self.m)


def _summed(blocks: Sequence[tuple[Tensor, Tensor]], d: int, m: int) -> Moments:
    sums = Moments(d, m)
    for x, y in blocks:
        sums.add(x, y)
    return sums


def fit_gathered(
    seen: Gathered, unseen: Gathered, mean: Tensor, mean_bias: Tensor | None, *, free: bool = False
) -> Fit:
    """As `mergeid.repair.closed_form.fit`, by whichever form is the smaller one.

    Args:
        seen, unseen: rows to fit on, and others; used up.
        mean, mean_bias: W̄ [m, d] and b̄ [m]; a layer without a bias has none.
        free: the rows count about their own means, those fitted on and the unseen ones each.
    """
    few, others = seen.rows, unseen.rows
    if few is None or others is None:
        sums = [g.moments.centred() if free else g.moments for g in (seen, unseen)]
        return fit(sums[0], sums[1], mean, mean_bias)
    rows = [few, others]
    del few, others
    seen.blocks = unseen.blocks = None  # no more of them than once
    if free:
        rows = [_about_means(each) for each in rows]
    return _fit_rows(rows, mean.double(), None if mean_bias is None else mean_bias.double())


def _about_means(rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    x, y = (each.double() for each in rows)
    return x - x.mean(0), y - y.mean(0)


def _pieces(x: Tensor, at: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Columns of x - at [n, ·], float64, some at a time."""
    for begin in range(0, x.shape[1], COLUMNS):
        which = slice(begin, begin + COLUMNS)
        yield which, x[:, which].double() - at[which]


def _kernel(x: Tensor, other: Tensor, at: Tensor) -> Tensor:
    """Inner products of the rows about a point [n, n']."""
    found = torch.zeros(len(x), len(other), dtype=torch.float64, device=x.device)
    for which, piece in _pieces(x, at):
        found.addmm_(piece, (other[:, which].double() - at[which]).T)
    return found


def _residuals(x: Tensor, y: Tensor, at: Tensor, to: Tensor, weight: Tensor) -> Tensor:
    """What the matrix leaves of the answers about two points [n, m]."""
    found = y - to
    for which, piece in _pieces(x, at):
        found.addmm_(piece, weight[:, which].T, alpha=-1)
    return found


class _Small:
    """The n x n problem on rows x [n, d], of any float type, and y [n, m], float64."""

    def __init__(self, x: Tensor, y: Tensor, mean: Tensor, bias: bool, kernel: Tensor | None = None) -> None:
        self.x, self.mean, self.bias = x, mean, bias
        self.at = x.mean(0, dtype=torch.float64) if bias else torch.zeros_like(x[0], dtype=torch.float64)
        self.to = y.mean(0) if bias else torch.zeros_like(y[0])
        self.kernel = _kernel(x, x, self.at) if kernel is None else kernel
        self.strength = float(self.kernel.trace()) / x.shape[1]
        self.left = _residuals(x, y, self.at, self.to, mean)

    def solution(self, ridge: float, *, last: bool = False) -> tuple[Tensor, Tensor | None]:
        """W and b.

        Args:
            last: the kernel is needed no more.
        """
        weight = self.mean.clone()
        if self.strength > 0:  # constant inputs move the bias alone
            system = self.kernel if last else self.kernel.clone()
            system.diagonal().add_(ridge * self.strength)
            torch.linalg.cholesky(system, out=system)
            coefficients = torch.cholesky_solve(self.left, system)
            for which, piece in _pieces(self.x, self.at):
                weight[:, which].addmm_(coefficients.T, piece)
        return weight, self.to - weight @ self.at if self.bias else None


class _Dual(_Small):
    """All ridges at once."""

    def __init__(self, x: Tensor, y: Tensor, mean: Tensor, bias: bool) -> None:
        super().__init__(x, y, mean, bias)
        values, self.vectors = torch.linalg.eigh(self.kernel)
        self.values, self.within = values.clamp(min=0), self.vectors.T @ self.left

    def _shrunk(self, ridge: float) -> Tensor:
        """(K + λ n)⁻¹ of the residuals, in the eigenbasis [n, m]; constant inputs move the bias alone."""
        if not self.strength > 0:
            return torch.zeros_like(self.within)
        shrunk: Tensor = self.within / (self.values + ridge * self.strength)[:, None]
        return shrunk

    def missed(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals of the average with the mean answer set right [·, m], and rows in the eigenbasis [·, n]."""
        return _residuals(x, y, self.at, self.to, self.mean), _kernel(x, self.x, self.at) @ self.vectors

    def still_missed(self, missed: tuple[Tensor, Tensor], ridge: float) -> float:
        """Mean squared error per row."""
        return float((missed[0] - missed[1] @ self._shrunk(ridge)).square().sum(1).mean())


@dataclass(frozen=True)
class _Judged:
    """Unseen rows, and how far a layer's answers are from theirs.

    Attributes:
        x, y: rows; spread: mean square of the answers (with a bias about their mean), summed over the outputs.
    """

    x: Tensor
    y: Tensor
    spread: float

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """Mean squared error per row, over the spread."""
        nowhere = torch.zeros_like(self.x[0], dtype=torch.float64)
        missed = _residuals(self.x, self.y, nowhere, torch.zeros_like(self.y[0]) if bias is None else bias, weight)
        return float(missed.square().sum(1).mean()) / self.spread


def _fit_rows(rows: list[tuple[Tensor, Tensor]], mean: Tensor, mean_bias: Tensor | None) -> Fit:
    """`rows`: to fit on, and unseen ones; they are used up."""
    bias, (seen, unseen) = mean_bias is not None, rows
    y = unseen[1]
    judged = _Judged(*unseen, max(float((y - y.mean(0) if bias else y).square().sum(1).mean()), 1e-300))
    before = judged.error(mean, mean_bias)
    chosen = _one_by_one if len(seen[0]) > MANY else _all_at_once
    best, after = chosen(seen, judged, mean, mean_bias, before)
    if best == inf:
        return Fit(mean, mean_bias, inf, before, before)
    x, y = (torch.cat(pair) for pair in zip(seen, unseen, strict=True))
    del seen, unseen, judged
    rows.clear()
    every = _Small(x, y, mean, bias)
    del y
    weight, b = every.solution(best, last=True)
    return Fit(weight, b, best, before, after)


def _all_at_once(
    seen: tuple[Tensor, Tensor], judged: _Judged, mean: Tensor, mean_bias: Tensor | None, before: float
) -> tuple[float, float]:
    """The best ridge and its error on unseen rows."""
    dual = _Dual(*seen, mean, mean_bias is not None)
    best, lowest, missed = inf, before, dual.missed(judged.x, judged.y)
    for ridge in RIDGES:
        found = dual.still_missed(missed, ridge) / judged.spread
        if found < lowest - NOTHING:
            best, lowest = ridge, found
    return best, lowest


def _one_by_one(
    seen: tuple[Tensor, Tensor], judged: _Judged, mean: Tensor, mean_bias: Tensor | None, before: float
) -> tuple[float, float]:
    """As `_all_at_once`, by a sample of the outputs."""
    few = torch.linspace(0, len(mean) - 1, min(len(mean), CHOOSING)).long()
    small = _Small(seen[0], seen[1][:, few], mean[few], mean_bias is not None)
    sample = replace(judged, y=judged.y[:, few])
    best, lowest = inf, sample.error(mean[few], None if mean_bias is None else mean_bias[few])
    rises, last = 0, inf
    for ridge in RIDGES:
        found = sample.error(*small.solution(ridge))
        if found < lowest - NOTHING * len(few) / len(mean):
            best, lowest = ridge, found
        rises, last = (rises + 1 if found > last else 0), found
        if rises == RISES and best < inf:
            break
    if best == inf:
        return inf, before
    after = judged.error(*_Small(seen[0], seen[1], mean, mean_bias is not None, small.kernel).solution(best, last=True))
    return (best, after) if after < before - NOTHING else (inf, before)
