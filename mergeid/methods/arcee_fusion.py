"""Arcee Fusion: take over what matters of a fine-tune, and nothing else (arcee.ai)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mergeid.methods import task_arithmetic
from mergeid.methods.registry import register_method
from mergeid.methods.task_arithmetic import in_pieces, wide

SMALLEST = 1e-8
"""Added to the probabilities before their logarithm."""


def importance(tensors: Sequence[Tensor]) -> Tensor:
    """``|b − a| · KL(softmax(b) ‖ softmax(a))``, softmax and divergence along the last axis; flat.

    Args:
        tensors: a and b, of equal shape.
    """
    _, to = wide(tensors)
    width = tensors[0].shape[-1] if tensors[0].dim() else 1
    a, b = (t.reshape(-1, width) for t in tensors)
    found = torch.empty(a.shape, dtype=to)
    step = max(1, task_arithmetic.CHUNK // max(width, 1))
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        ours, theirs = a[rows].to(to), b[rows].to(to)
        p, q = (torch.softmax(x, -1).add_(SMALLEST) for x in (theirs, ours))
        divergence = (p * torch.log(p / q)).sum(-1, keepdim=True)
        found[rows] = (theirs - ours).abs_().mul_(divergence)
    return found.reshape(-1)


def threshold(scores: Tensor) -> float:
    """median + 1.5 · (upper quartile − lower quartile), each the element below that place in ascending order."""
    ordered = scores.numpy().copy()
    places = [int(share * (ordered.size - 1)) for share in (0.25, 0.5, 0.75)]
    ordered.partition(sorted(set(places)))
    low, middle, high = (float(ordered[p]) for p in places)
    return middle + 1.5 * (high - low)


@register_method("arcee_fusion", elementwise=False, weights="ignored", most=2, ordered=True)
def arcee_fusion(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``a + m ⊙ (b − a)``, m where the importance of the change (`importance`) reaches the `threshold`.

    The quartiles are those of all elements (mergekit draws a million where there are more).

    Args:
        tensors: a (recipes call it the base) and b, of equal shape.
        weights: not looked at.

    Returns:
        Tensor of that shape, in the narrowest dtype that holds both exactly.
    """
    dtype, to = wide(tensors)
    if tensors[0].numel() == 0:
        return tensors[0].to(dtype, copy=True)
    scores = importance(tensors)
    cut = threshold(scores)
    if not np.isfinite(cut):  # infinite weights, which are refused where they are read
        return tensors[1].to(dtype, copy=True)

    def merge(place: slice, pieces: list[Tensor]) -> Tensor:
        ours, theirs = (piece.to(to) for piece in pieces)
        return ours + (theirs - ours) * (scores[place] >= cut)

    return in_pieces(tensors, dtype, merge)
