"""Which positions of a classifying head a task scores: those that its loss looks at.

A masked language model is trained on hidden tokens alone; what it says of those that it sees means nothing, and there
are six times as many of them. Likewise the prompts of a chat. Where the data has labels they tell these positions
apart. The labels themselves are not looked at: every one is replaced by the same class first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergeid.data.batching import IGNORED
from mergeid.errors import MergeidError
from mergeid.plugins import Batch

if TYPE_CHECKING:
    from mergeid.models.loaded import Loaded


def scored_positions(first: Loaded, batch: Batch, shape: torch.Size) -> Tensor | None:
    """bool [examples, positions]: where the loss of the task output depends on it; None where the batch does not say.

    Args:
        first: whose loss it is.
        batch: with its labels.
        shape: of the task output without its classes.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or len(shape) != 2 or labels.dim() != 2:
        return None
    if not bool((labels == IGNORED).any()):
        return None
    with torch.enable_grad():
        said = torch.zeros(*shape, 2, device=labels.device, requires_grad=True)
        try:
            parts = first.loss(said, {**batch, "labels": labels.where(labels == IGNORED, 0)})
        except MergeidError:  # labels of something else
            return None
        if parts is None or not parts.loss.requires_grad:
            return None
        (slope,) = torch.autograd.grad(parts.loss.sum(), said)
    return (slope != 0).any(-1)


def counted_positions(batch: Batch, shape: torch.Size, first: Loaded | None = None) -> Tensor | None:
    """bool [examples, positions]: what is no padding and, where the batch says so, what the task scores, in an example
    without any all of it; None: everything counts.

    Args:
        shape: of what is counted, without classes.
        first: whose task output it is of, as in `scored_positions`.
    """
    mask = batch.get("attention_mask")
    real = mask.bool() if isinstance(mask, Tensor) and mask.shape == shape else None
    scored = None if first is None else scored_positions(first, batch, shape)
    if scored is not None and scored.shape == shape:
        real = torch.ones_like(scored) if real is None else real
        kept = scored & real
        real = torch.where(kept.any(1, keepdim=True), kept, real)
    return real


def per_example(scores: Tensor, batch: Batch, count: int, first: Loaded | None = None) -> Tensor:
    """Means over what belongs to an example, padding left out, float64 [count]; where the first dimension is not that
    of the examples, the mean over all of them for each.

    Args:
        scores: per example, or per example and position.
        first: whose task output the scores are of: those positions count that its loss scores, in an example without
            any all of them.
    """
    real = counted_positions(batch, scores.shape, first)
    if real is not None:
        # what padding holds need be no number
        return scores.double().masked_fill(~real, 0.0).sum(1) / real.sum(1).clamp(min=1)
    if scores.shape[:1] != (count,):
        return scores.double().mean().expand(count)
    return scores.double().reshape(count, -1).mean(1)
