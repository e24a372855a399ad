"""TIES-Merging: trim, elect signs, merge what agrees (Yadav et al. 2023, arXiv:2306.01708)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergeid.methods.registry import register_method
from mergeid.methods.sparse import elect_and_merge, parameters, regained
from mergeid.methods.task_arithmetic import in_pieces, wide


@register_method(
    "ties",
    elementwise=False,
    weights="free",
    base=True,
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
) -> Tensor:
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
        origin = base.to(to)
        masks = ((t.to(to) - origin).abs_().reshape(-1) >= cut for t, cut in zip(tensors, cuts, strict=True))
        scales = [regained(t, base, mask, rescale_norm, to) for t, mask in zip(tensors, masks, strict=True)]

    def merge(_: slice, pieces: list[Tensor]) -> Tensor:
        origin = pieces[-1].to(to)
        deltas = [piece.to(to) - origin for piece in pieces[:-1]]
        parts = [d.mul_(d.abs() >= cut).mul_(w * c) for d, cut, w, c in zip(deltas, cuts, weights, scales, strict=True)]
        return elect_and_merge(parts, weights, normalize).mul_(scale).add_(origin)

    return in_pieces([*tensors, base], dtype, merge)


def threshold(tensor: Tensor, base: Tensor, density: float, dtype: torch.dtype) -> float:
    """The magnitude from which on elements of ``tensor − base`` are kept: that of the ⌊density · n⌋-th largest, the
    largest at least.

    Elements that tie with it are kept too, so that the order of the neurons does not matter.
    """
    if density >= 1 or tensor.numel() == 0:
        return 0.0
    if density <= 0:
        return math.inf
    size = (tensor.to(dtype) - base.to(dtype)).abs_().reshape(-1).numpy()
    place = size.size - max(1, int(density * size.size))
    size.partition(place)
    return float(size[place])
