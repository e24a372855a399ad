"""Merging on the sphere: slerp of two tensors, Karcher mean of several."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergeid.methods.registry import Parameter, linear, register_method
from mergeid.methods.task_arithmetic import in_pieces, wide

CHUNK = 1 << 20
"""Elements whose products are added in float64 at once."""
TINY_ANGLE = 1e-7
"""Below this angle (rad) sin(tθ)/sin θ = t to the last digit of float64, and next to π the direction is not defined."""


VANISHES = 1e-7
"""Length of a mean of unit vectors below which they cancel."""


def dot(x: Tensor, y: Tensor) -> float:
    """Σ x y in float64, whatever the inputs' dtype."""
    flat = zip(x.reshape(-1).split(CHUNK), y.reshape(-1).split(CHUNK), strict=True)
    return math.fsum(torch.dot(a.double(), b.double()).item() for a, b in flat)


def angle(x: Tensor, y: Tensor) -> float:
    """Angle between two tensors as vectors, in [0, π]; exact for small angles too (Kahan's formula). 0 for zeros."""
    nx, ny = math.sqrt(dot(x, x)), math.sqrt(dot(y, y))
    if nx == 0 or ny == 0:
        return 0.0
    less = more = 0.0
    for a, b in zip(x.reshape(-1).split(CHUNK), y.reshape(-1).split(CHUNK), strict=True):
        u, v = a.double() / nx, b.double() / ny
        less += (u - v).square().sum().item()
        more += (u + v).square().sum().item()
    return 2 * math.atan2(math.sqrt(less), math.sqrt(more))


@register_method("slerp", elementwise=False, most=2)
def slerp(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``(sin((1−t)θ) a + sin(tθ) b) / sin θ``: constant speed on the great circle from a to b (Shoemake 1985).

    θ is the angle between the two tensors, flattened; lengths are interpolated along. Parallel, opposite and zero
    tensors have no such circle: there it is the straight line.

    Args:
        tensors: a and b, of equal shape.
        weights: 1 − t and t.

    Returns:
        Tensor of that shape, in the narrowest dtype that holds both exactly.
    """
    theta = angle(*tensors)
    if theta < TINY_ANGLE or theta > math.pi - TINY_ANGLE:
        return linear(tensors, weights)
    return combination(tensors, [math.sin(w * theta) / math.sin(theta) for w in weights])


def combination(tensors: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """Σ_i c_i x_i, rounded once, for factors of any size."""
    dtype, to = wide(tensors)

    def merge(_: slice, pieces: list[Tensor]) -> Tensor:
        total = torch.zeros(pieces[0].shape, dtype=to)
        for piece, factor in zip(pieces, factors, strict=True):
            total.add_(piece.to(to), alpha=factor)
        return total

    return in_pieces(tensors, dtype, merge)


@register_method(
    "karcher",
    elementwise=False,
    parameters=[
        Parameter("max_iter", 50, 1, 10_000, help="most steps"),
        Parameter("tol", 1e-9, 0.0, 1.0, help="angle (rad) at which to stop"),
    ],
)
def karcher(tensors: Sequence[Tensor], weights: Sequence[float], *, max_iter: int = 50, tol: float = 1e-9) -> Tensor:
    """The weighted Karcher (Fréchet) mean on the sphere: ``argmin_u Σ_i w_i ∠(u, θ_i)²`` with ‖u‖ = 1, times
    ``Σ_i w_i ‖θ_i‖`` (Karcher 1977). For two models of one length it is `slerp`.

    Fixed-point steps u ← exp_u(Σ_i w_i log_u(θ_i/‖θ_i‖)), from the normalised weighted sum. Zero tensors have no
    direction and only shorten the result; opposite tensors have no mean, and the straight average is taken.

    Args:
        tensors: θ_i, of equal shape.
        weights: w_i with sum 1.
        max_iter: most steps.
        tol: step (rad) at which to stop.

    Returns:
        Tensor of that shape, in the narrowest dtype that holds all θ_i exactly.
    """
    dtype, _ = wide(tensors)
    if all(t.dtype == dtype and torch.equal(tensors[0], t) for t in tensors):
        return tensors[0].to(dtype, copy=True)
    products = torch.tensor([[dot(x, y) for y in tensors] for x in tensors], dtype=torch.float64)
    lengths = torch.diagonal(products).sqrt()
    used = [i for i, w in enumerate(weights) if w != 0 and lengths[i] > 0]
    shares = torch.tensor([weights[i] for i in used], dtype=torch.float64)
    if not used or abs(shares.sum()) < 1e-12:
        return linear(tensors, weights)
    shares = shares / shares.sum()
    cosines = products[used][:, used] / torch.outer(lengths[used], lengths[used])
    found = _mean_direction(cosines, shares, max_iter, tol)
    if found is None:
        return linear(tensors, weights)
    length = math.fsum(w * n for w, n in zip(weights, lengths.tolist(), strict=True))
    factors = [0.0] * len(tensors)
    for i, c in zip(used, found.tolist(), strict=True):
        factors[i] = length * c / float(lengths[i])
    return combination(tensors, factors)


def _mean_direction(cosines: Tensor, shares: Tensor, max_iter: int, tol: float) -> Tensor | None:
    """The Karcher mean of unit vectors as a combination of them; None where their weighted sum vanishes.

    It lies in their span, so that only their cosines are needed: the vectors, which may be large, are read once.

    Args:
        cosines: float64 [n, n].
        shares: float64 [n], sum 1.
    """

    def size(factors: Tensor) -> float:
        return math.sqrt(max(float(factors @ cosines @ factors), 0.0))

    mean = shares.clone()
    if size(mean) < VANISHES:
        return None
    mean = mean / size(mean)
    for _ in range(max_iter):
        toward = (cosines @ mean).clamp(-1, 1)
        theta = torch.arccos(toward)
        sine = torch.sin(theta)
        pull = shares * torch.where(sine > TINY_ANGLE, theta / sine.clamp(min=TINY_ANGLE), torch.ones_like(sine))
        pull = torch.where(theta > math.pi - TINY_ANGLE, torch.zeros_like(pull), pull)
        step = pull - float(pull @ toward) * mean
        moved = size(step)
        if moved <= tol:
            break
        mean = mean * math.cos(moved) + step * (math.sin(moved) / moved)
        mean = mean / size(mean)
    return mean
