"""Merging on the sphere: slerp of two tensors, Karcher mean of several."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mergeid.methods.pieces import HALF, Pieces, added_up, as_it_is, in_pieces
from mergeid.methods.registry import Parameter, linear, register_method
from mergeid.methods.task_arithmetic import wide

TINY_ANGLE = 1e-7
"""Below this angle (rad) sin(tθ)/sin θ = t to the last digit of float64, and next to π the direction is not defined."""
NEARLY_OPPOSITE = 1e-3
"""Of ‖x/‖x‖ + y/‖y‖‖²."""
SAFE = (1e-25, 1e30)
"""Totals of squares between these have lost nothing in float32."""
VANISHES = 1e-7
"""Length of a mean of unit vectors below which they cancel."""


def products(vectors: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
    """float64 [n, n]: Σ x_i x_j of tensors, flattened (of what they add to the base, where there is one).

    Products and sums of a piece are taken in the accumulator's format (`wide`), those of the pieces in float64.
    """
    count = len(vectors)

    def sums(x: list[Tensor]) -> list[Tensor]:
        return [(x[i] * x[j]).sum() for i in range(count) for j in range(i, count)]

    found = _sums(vectors, base, sums)
    out = torch.zeros(count, count, dtype=torch.float64)
    if len(found):
        above = torch.triu_indices(count, count)
        out[above[0], above[1]] = out[above[1], above[0]] = found
    return out


def angle(x: Tensor, y: Tensor, base: Tensor | None = None) -> float:
    """Angle between two tensors as vectors (between what they add to the base), in [0, π]; exact for small angles too,
    by Kahan's formula, whose lengths come from those of x, y and their difference. 0 where one is zero."""

    def sums(pieces: list[Tensor]) -> list[Tensor]:
        u, v = pieces
        less = u - v
        return [u.mul_(u).sum(), v.mul_(v).sum(), less.mul_(less).sum()]

    found = _sums([x, y], base, sums).tolist()
    if not found or found[0] == 0 or found[1] == 0:
        return 0.0
    nx, ny, apart = (math.sqrt(s) for s in found)
    # ‖x/‖x‖ − y/‖y‖‖², and the same with a plus: together 4
    less = min(max((apart - abs(nx - ny)) * (apart + abs(nx - ny)) / nx / ny, 0.0), 4.0)
    more = 4 - less
    if more < NEARLY_OPPOSITE:  # what is left of 4 has no digits then

        def opposite(pieces: list[Tensor]) -> list[Tensor]:
            u, v = pieces
            return [(u / nx).add_(v / ny).square_().sum()]

        more = float(_sums([x, y], base, opposite, torch.float64)[0])
    return 2 * math.atan2(math.sqrt(less), math.sqrt(more))


def _sums(
    vectors: Sequence[Tensor],
    base: Tensor | None,
    sums: Callable[[list[Tensor]], list[Tensor]],
    to: torch.dtype | None = None,
) -> Tensor:
    """Totals of products of the vectors' pieces; again in float64 where float32 may have gone over or under.

    Args:
        to: the format to take them in; None: the accumulator's.
    """
    every, kind = [*vectors, *([] if base is None else [base])], to or wide(vectors)[1]
    step = HALF if kind == torch.float64 else None
    found = added_up(every, lambda _, pieces: sums(vectors_of(pieces, base is not None, kind)), step)
    if kind != torch.float64 and len(found) and not bool(((found.abs() > SAFE[0]) & (found.abs() < SAFE[1])).all()):
        return _sums(vectors, base, sums, torch.float64)
    return found


def vectors_of(pieces: Sequence[Tensor], based: bool, to: torch.dtype) -> list[Tensor]:
    """Fresh copies in the format `to`; of what is added to the last piece, if it is the base's."""
    if not based:
        return [p.to(to, copy=True) for p in pieces]
    origin = pieces[-1].to(to)
    return [p.to(to) - origin for p in pieces[:-1]]


@register_method("slerp", elementwise=False, most=2, shows=True)
def slerp(tensors: Sequence[Tensor], weights: Sequence[float]) -> Pieces:
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
        return straight(tensors, weights)
    return combination(tensors, [math.sin(w * theta) / math.sin(theta) for w in weights])


def straight(tensors: Sequence[Tensor], weights: Sequence[float]) -> Pieces:
    """The weighted sum, as `linear` takes it."""
    return in_pieces(tensors, wide(tensors)[0], lambda _, pieces: linear(pieces, weights))


def combination(tensors: Sequence[Tensor], factors: Sequence[float], base: Tensor | None = None) -> Pieces:
    """Σ_i c_i x_i, rounded once, for factors of any size; with a base θ_0 + Σ_i c_i (x_i − θ_0)."""
    dtype, to = wide(tensors)

    def merge(_: slice, pieces: list[Tensor]) -> Tensor:
        total, *others = vectors_of(pieces, base is not None, to)
        total.mul_(factors[0])
        for other, factor in zip(others, factors[1:], strict=True):
            total.add_(other, alpha=factor)
        return total if base is None else total.add_(pieces[-1].to(to))

    return in_pieces([*tensors, *([] if base is None else [base])], dtype, merge)


@register_method(
    "karcher",
    elementwise=False,
    shows=True,
    parameters=[
        Parameter("max_iter", 50, 1, 10_000, help="most steps"),
        Parameter("tol", 1e-9, 0.0, 1.0, help="angle (rad) at which to stop"),
    ],
)
def karcher(tensors: Sequence[Tensor], weights: Sequence[float], *, max_iter: int = 50, tol: float = 1e-9) -> Pieces:
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
        return as_it_is(tensors[0], dtype)
    found = products(tensors)
    lengths = torch.diagonal(found).sqrt()
    used = [i for i, w in enumerate(weights) if w != 0 and lengths[i] > 0]
    shares = torch.tensor([weights[i] for i in used], dtype=torch.float64)
    if not used or abs(shares.sum()) < 1e-12:
        return straight(tensors, weights)
    shares = shares / shares.sum()
    cosines = found[used][:, used] / torch.outer(lengths[used], lengths[used])
    mean = _mean_direction(cosines, shares, max_iter, tol)
    if mean is None:
        return straight(tensors, weights)
    length = math.fsum(w * n for w, n in zip(weights, lengths.tolist(), strict=True))
    factors = [0.0] * len(tensors)
    for i, c in zip(used, mean.tolist(), strict=True):
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
