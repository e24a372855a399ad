"""Arcee Fusion: take over what matters of a fine-tune, and nothing else (arcee.ai)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mergeid.methods.pieces import Pieces, as_it_is, in_pieces, rows_at_once
from mergeid.methods.quantiles import at_places
from mergeid.methods.registry import register_method
from mergeid.methods.task_arithmetic import wide

SMALLEST = 1e-8
"""Added to the probabilities before their logarithm."""


def importance(tensors: Sequence[Tensor]) -> Pieces:
    """``|b − a| · KL(softmax(b) ‖ softmax(a))``, softmax and divergence along the last axis, whole ones to a piece.

    Args:
        tensors: a and b, of equal shape.
    """
    _, to = wide(tensors)
    width = max(1, tensors[0].shape[-1] if tensors[0].dim() else 1)

    def scores(_: slice, pieces: list[Tensor]) -> Tensor:
        ours, theirs = (piece.reshape(-1, width).to(to) for piece in pieces)
        p, q = (torch.softmax(x, -1).add_(SMALLEST) for x in (theirs, ours))
        divergence = (p * torch.log(p / q)).sum(-1, keepdim=True)
        return (theirs - ours).abs_().mul_(divergence).reshape(-1)

    return in_pieces(tensors, to, scores, width * rows_at_once(width))


def threshold(scores: Pieces) -> float:
    """median + 1.5 · (upper quartile − lower quartile), each the element below that place in ascending order."""
    last = math.prod(scores.shape) - 1
    ranks = [int(share * last) for share in (0.25, 0.5, 0.75)]
    low, middle, high = at_places(scores.parts, ranks, scores.dtype, signed=True)
    return middle + 1.5 * (high - low)


@register_method("arcee_fusion", elementwise=False, weights="ignored", most=2, ordered=True)
def arcee_fusion(tensors: Sequence[Tensor], weights: Sequence[float]) -> Pieces:
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
        return as_it_is(tensors[0], dtype)
    scores = importance(tensors)
    cut = threshold(scores)
    if not math.isfinite(cut):  # infinite weights, which are refused where they are read
        return as_it_is(tensors[1], dtype)
    flat = [t.reshape(-1) for t in tensors]

    def parts() -> Iterator[Tensor]:
        at = 0
        for score in scores:
            ours, theirs = (t[at : at + len(score)].to(to) for t in flat)
            at += len(score)
            yield ours.add((theirs - ours).mul_(score >= cut)).to(dtype)

    return Pieces(tensors[0].shape, dtype, parts)
