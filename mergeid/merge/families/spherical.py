"""Merging on the sphere: slerp of two tensors, Karcher mean of several."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergeid.merge.families.task_arithmetic import wide
from mergeid.merge.methods import Parameter, linear, register_method

CHUNK = 1 << 20
"""Elements whose products are added in float64 at once."""
TINY_ANGLE = 1e-7
"""Below this angle (rad) sin(tθ)/sin θ = t to the last digit of float64, and next to π the direction is not defined."""


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
    dtype, to = wide(tensors)
    a, b = (t.to(to) for t in tensors)
    theta = angle(a, b)
    if theta < TINY_ANGLE or theta > math.pi - TINY_ANGLE:
        return linear(tensors, weights)
    first, second = (math.sin(w * theta) / math.sin(theta) for w in weights)
    return (a * first).add_(b * second).to(dtype)


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
    dtype, to = wide(tensors)
    if all(torch.equal(tensors[0].to(to), t.to(to)) for t in tensors[1:]):
        return tensors[0].to(dtype, copy=True)
    lengths = [math.sqrt(dot(t, t)) for t in tensors]
    length = math.fsum(w * n for w, n in zip(weights, lengths, strict=True))
    found = [(w, t.to(torch.float64) / n) for w, t, n in zip(weights, tensors, lengths, strict=True) if n > 0 and w]
    total = math.fsum(w for w, _ in found)
    if not found or abs(total) < 1e-12:
        return linear(tensors, weights)
    units = [(w / total, u) for w, u in found]
    mean = sum((u * w for w, u in units[1:]), units[0][1] * units[0][0])
    size = math.sqrt(dot(mean, mean))
    if size < 1e-9:
        return linear(tensors, weights)
    mean /= size
    for _ in range(max_iter):
        step = torch.zeros_like(mean)
        for w, u in units:
            theta = angle(mean, u)
            if TINY_ANGLE < theta < math.pi - TINY_ANGLE:
                step.add_(u - mean * math.cos(theta), alpha=w * theta / math.sin(theta))
            elif theta <= TINY_ANGLE:
                step.add_(u - mean, alpha=w)
        moved = math.sqrt(dot(step, step))
        if moved <= tol:
            break
        mean = mean * math.cos(moved) + step * (math.sin(moved) / moved)
        mean /= math.sqrt(dot(mean, mean))
    return mean.mul_(length).to(dtype)
