"""BatchNorm statistics measured on few inputs, shrunk towards those that the layer has, by their sampling error.

The averaged statistics of a merge are biased, more or less; measured ones are right on average, but off by their
sampling error, and the fewer inputs, the more. How far the former are off shows in how much farther the two lie apart
than sampling explains: with d_c the shift of channel c and e_c its standard error, τ² = max(0, mean_c(d_c² − e_c²)) is
what is left, and

    statistic = averaged + w_c d_c,    w_c = τ² / (τ² + e_c²)

(empirical Bayes with a normal prior about the averaged statistics; James and Stein 1961, Efron and Morris 1973). Means
are shifted in units of the channel's standard deviation, variances on the scale of their logarithm; each has its own τ²
in every layer. Where the averaged statistics are right, next to nothing moves; where they are far off or inputs are
many, the measured ones are taken.

The standard errors count examples, not values: positions of one image are no independent draws. With n_i values in
example i and T_i their sum, the mean's is that of a ratio, e² = N/(N−1) Σ_i (T_i − n_i x̄)² / (Σ n_i)²; the variance's
is the same with Σ (x − x̄)² in place of T_i.
"""

from __future__ import annotations

import torch
from torch import Tensor

CONSTANT = 1e-6
"""A channel that varies by less than this share of the variance that it had is constant on the calibration data."""


def example_sums(x: Tensor, about: Tensor) -> Tensor:
    """What standard errors are made of: sums over the examples of one call, which add up over calls.

    Args:
        x: inputs of a layer, [N, C, ...].
        about: [C], subtracted first, for the sake of precision; the same in all calls.

    Returns:
        float64 [2 + 5 C]: N, Σ n², then for every channel Σ T², Σ T Q, Σ Q², Σ n T and Σ n Q, with T and Q the sums of
        x and of its square over the n positions of an example.
    """
    count = x.shape[0]
    size = x[0, 0].numel()
    sums = x.double().reshape(count, x.shape[1], -1) - about.double().to(x.device)[:, None]
    total, square = sums.sum(2), sums.square().sum(2)
    parts = [total.square(), total * square, square.square(), size * total, size * square]
    return torch.cat([x.new_tensor([count, count * size**2], dtype=torch.float64), *(p.sum(0) for p in parts)])


def width(channels: int) -> int:
    """Length of `example_sums`."""
    return 2 + 5 * channels


def shrunken(
    count: Tensor, mean: Tensor, variance: Tensor, sums: Tensor, own: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean and variance to use, each float64 [C].

    Args:
        count: how many values were measured in every channel.
        mean, variance: measured, [C].
        sums: `example_sums` about the layer's own mean.
        own: mean and variance that the layer has.
    """
    error_of_mean, error_of_variance = _squared_errors(count, mean - own[0], variance, sums)
    constant = ~(variance > CONSTANT * own[1])
    scale = torch.where(constant, own[1], variance)
    spread = scale.sqrt()
    shift = (mean - own[0]) / spread
    moved_mean = own[0] + spread * _shrunk(shift, error_of_mean / scale)
    # where either is constant there is no ratio, and what was measured remains
    ratio = (variance / own[1]).log().masked_fill(constant, torch.nan)
    moved_variance = own[1] * _shrunk(ratio, error_of_variance / variance.square()).exp()
    return moved_mean, torch.where(ratio.isfinite(), moved_variance, variance)


def _squared_errors(count: Tensor, mean: Tensor, variance: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Squared standard errors of a mean (about the same point as the sums) and of a variance; infinite of one."""
    examples, squares = sums[0], sums[1]
    tt, tq, qq, nt, nq = sums[2:].reshape(5, -1)
    of_mean = tt - 2 * mean * nt + mean.square() * squares
    # Σ (x − x̄)² − n s² of an example is Q − 2 x̄ T + n k
    k = mean.square() - variance
    of_variance = qq + 4 * mean.square() * tt + k.square() * squares - 4 * mean * tq + 2 * k * nq - 4 * mean * k * nt
    factor = torch.where(examples > 1, examples / (examples - 1), torch.inf) / count.square()
    return (of_mean.clamp(min=0) * factor).nan_to_num(nan=torch.inf), (of_variance.clamp(min=0) * factor).nan_to_num(
        nan=torch.inf
    )


def _shrunk(shift: Tensor, error: Tensor) -> Tensor:
    """What remains of a shift, [C], by its squared standard error. What is no number takes no part and stays."""
    known = shift.isfinite() & ~error.isnan()
    if not bool(known.any()):
        return shift
    beyond = (shift.square() - error)[known].mean().clamp(min=0)
    weight = torch.where(error > 0, beyond / (beyond + error), 1.0)
    return torch.where(known, weight * shift, shift)
