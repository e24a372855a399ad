"""TIES-Merging: trim, elect signs, merge what agrees (Yadav et al. 2023, arXiv:2306.01708)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mergeid.methods.pieces import HALF, Pieces, in_pieces, places
from mergeid.methods.quantiles import at_places
from mergeid.methods.registry import register_method
from mergeid.methods.sparse import elect_and_merge, parameters, regained
from mergeid.methods.task_arithmetic import wide


@register_method(
    "ties",
    elementwise=False,
    weights="free",
    base=True,
    shows=True,
    parameters=parameters(rescale=False, norm="l1", normalize=True),
)
def ties(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    base: Tensor,
    density: Sequence[float],
    scale: float = 1.0,
    normalize: bool = True,
    rescale: bool = False,
    rescale_norm: str = "l1",
) -> Pieces:
    """Trim each task vector τ_i = θ_i − θ_0, elect a sign per element, and merge the values that bear it.

    Trim: τ̂_i keeps the ``density_i`` share of largest magnitude. Elect: γ = sign(Σ_i w_i τ̂_i), zero counting as
    positive. Disjoint merge: ``θ_0 + λ Σ_{i∈A} w_i τ̂_i / Σ_{i∈A} w_i``, A = {i: sign(w_i τ̂_i) = γ}.

    Args:
        tensors: θ_i, of equal shape.
        weights: w_i; with `normalize` (the paper's mean) only their ratio counts.
        base: θ_0.
        density: share to keep, one per model.
        scale: λ.
        normalize: False leaves the division out.
        rescale: scale each trimmed task vector back to the norm that it had.
        rescale_norm: "l1", "l2" or "linf"; "probability" divides by the density.

    Returns:
        Tensor of that shape, in the narrowest dtype that holds all θ_i exactly.
    """
    dtype, to = wide(tensors)
    cuts = [threshold(tensor, base, share, to) for tensor, share in zip(tensors, density, strict=True)]
    scales = [1.0] * len(tensors)
    if rescale and rescale_norm == "probability":
        scales = [1 / share if share > 0 else 1.0 for share in density]
    elif rescale:
        scales = [
            regained((t, base), lambda _, delta, cut=cut: (delta.abs() >= cut).to(to), rescale_norm, to)  # type: ignore[misc]
            for t, cut in zip(tensors, cuts, strict=True)
        ]

    def merge(_: slice, pieces: list[Tensor]) -> Tensor:
        origin = pieces[-1].to(to)
        parts = []
        for piece, cut, weight, factor in zip(pieces[:-1], cuts, weights, scales, strict=True):
            delta = piece.to(to, copy=True).sub_(origin)
            if cut > 0:
                size = delta.abs()
                delta.mul_(torch.ge(size, cut, out=size))
            parts.append(delta.mul_(weight * factor))
        return elect_and_merge(parts, weights, normalize).mul_(scale).add_(origin)

    return in_pieces([*tensors, base], dtype, merge, HALF)


def threshold(tensor: Tensor, base: Tensor, density: float, to: torch.dtype) -> float:
    """The magnitude from which on elements of ``tensor − base`` are kept: that of the ⌊density · n⌋-th largest, the
    largest at least.

    Elements that tie with it are kept too, so that the order of the neurons does not matter.
    """
    count = tensor.numel()
    if density >= 1 or count == 0:
        return 0.0
    if density <= 0:
        return math.inf
    return magnitudes_at(tensor, base, [count - max(1, int(density * count))], to)[0]


def magnitudes_at(tensor: Tensor, base: Tensor, ranks: Sequence[int], to: torch.dtype) -> list[float]:
    """The magnitudes of ``tensor − base``, computed in the format `to`, at these places of their ascending order."""
    flat, origin = tensor.reshape(-1), base.reshape(-1)

    def magnitudes() -> Iterator[Tensor]:
        return (flat[place].to(to, copy=True).sub_(origin[place].to(to)).abs_() for place in places(len(flat), HALF))

    return at_places(magnitudes, ranks, to)
