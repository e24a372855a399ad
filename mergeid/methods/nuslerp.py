"""NuSLERP: slerp of two models or of two task vectors, whole or row by row (mergekit's own)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergeid.methods.pieces import Pieces, as_it_is, in_pieces, places, rows_at_once
from mergeid.methods.registry import Parameter, register_method
from mergeid.methods.spherical import angle, combination, vectors_of
from mergeid.methods.task_arithmetic import wide

SHORTEST = 1e-7
"""Vectors shorter than this are no unit vectors after division by their length, which is taken as this."""
NO_CIRCLE = 1e-16
"""Of 1 − cos² θ: there the straight line is taken."""


@register_method(
    "nuslerp",
    elementwise=False,
    base="optional",
    shows=True,
    parameters=[
        Parameter("nuslerp_flatten", True, help="one angle for the whole tensor"),
        Parameter("nuslerp_row_wise", False, help="without flattening: vectors along the first axis, not the last"),
    ],
    most=2,
)
def nuslerp(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    base: Tensor | None = None,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Pieces:
    """``(sin((1−t)θ) x_1 + sin(tθ) x_2) / sin θ`` for ``t = w_2 / (w_1 + w_2)``, x the models or, with a base, what
    they add to it. A zero vector stands at a right angle to everything.

    Args:
        tensors: θ_1 and θ_2, of equal shape.
        weights: w_1 and w_2, with sum 1.
        base: θ_0.
        nuslerp_flatten: one angle θ for the whole tensor; False: one per vector along an axis.
        nuslerp_row_wise: that axis is the first, else the last.

    Returns:
        Tensor of that shape, in the narrowest dtype that holds both exactly.
    """
    dtype = wide(tensors)[0]
    if base is None and torch.equal(tensors[0], tensors[1]):
        return as_it_is(tensors[0], dtype)
    if nuslerp_flatten or tensors[0].dim() == 0:
        factors = _factors(torch.tensor(_cosine(tensors, base), dtype=torch.float64), weights[1])
        return combination(tensors, [float(f) for f in factors], base)
    if nuslerp_row_wise:
        return _along_first(tensors, weights, base)
    return _along_last(tensors, weights, base)


def _cosine(tensors: Sequence[Tensor], base: Tensor | None) -> float:
    if torch.equal(tensors[0], tensors[1]):
        return 1.0
    if base is not None and any(torch.equal(t, base) for t in tensors):
        return 0.0
    if base is None and not all(bool(t.any()) for t in tensors):
        return 0.0
    return math.cos(angle(tensors[0], tensors[1], base))


def _along_last(tensors: Sequence[Tensor], weights: Sequence[float], base: Tensor | None) -> Pieces:
    """An angle for every vector along the last axis; pieces are whole ones."""
    dtype, to = wide(tensors)
    width = max(1, tensors[0].shape[-1])

    def merge(_: slice, pieces: list[Tensor]) -> Tensor:
        a, b = (x.reshape(-1, width) for x in vectors_of(pieces, base is not None, to))
        x, y = (v.double() / v.double().norm(dim=1, keepdim=True).clamp(min=SHORTEST) for v in (a, b))
        ours, theirs = _factors((x * y).sum(1, keepdim=True).clamp_(-1, 1), weights[1])
        merged = (a * ours.to(to)).add_(b * theirs.to(to)).reshape(-1)
        return merged if base is None else merged.add_(pieces[-1])

    return in_pieces(_with_base(tensors, base), dtype, merge, width * rows_at_once(width))


def _along_first(tensors: Sequence[Tensor], weights: Sequence[float], base: Tensor | None) -> Pieces:
    """An angle for every vector along the first axis; pieces are rows, of which every column's sums are taken first."""
    dtype, to = wide(tensors)
    width = max(1, tensors[0].numel() // max(1, tensors[0].shape[0]))
    step = width * rows_at_once(width)
    every = _with_base(tensors, base)
    flat = [t.reshape(-1) for t in every]
    sums = torch.zeros(3, width, dtype=torch.float64)
    for place in places(len(flat[0]), step):
        a, b = (x.double().reshape(-1, width) for x in vectors_of([t[place] for t in flat], base is not None, to))
        sums += torch.stack([(a * a).sum(0), (b * b).sum(0), (a * b).sum(0)])
    lengths = sums[:2].sqrt().clamp_(min=SHORTEST)
    ours, theirs = (f.to(to) for f in _factors((sums[2] / lengths[0] / lengths[1]).clamp_(-1, 1), weights[1]))

    def merge(_: slice, pieces: list[Tensor]) -> Tensor:
        a, b = (x.reshape(-1, width) for x in vectors_of(pieces, base is not None, to))
        merged = (a * ours).add_(b * theirs).reshape(-1)
        return merged if base is None else merged.add_(pieces[-1])

    return in_pieces(every, dtype, merge, step)


def _with_base(tensors: Sequence[Tensor], base: Tensor | None) -> list[Tensor]:
    return [*tensors, *([] if base is None else [base])]


def _factors(cosine: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """The two coefficients, for every angle."""
    straight = 1 - cosine.square() <= NO_CIRCLE
    theta = torch.arccos(torch.where(straight, 0, cosine))
    sine = torch.sin(theta)
    ours = torch.where(straight, 1 - t, torch.sin((1 - t) * theta) / sine)
    theirs = torch.where(straight, t, torch.sin(t * theta) / sine)
    return ours, theirs
