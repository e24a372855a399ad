"""What a language model is scored on: targets made from the text itself where the data has none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergeid.data.batching import Item


def add_targets(item: Item, about: Mapping[str, Any], *, ignored: int) -> None:
    """Fill in ``"labels"`` and ``"decoder_input_ids"`` in place, by the model's task.

    Causal models are scored on every next token. Encoder-decoders without targets are scored on the second half of the
    text given the first (prefix language modelling); with targets, the decoder's input is the target shifted right.
    """
    task, ids = about.get("task"), item[about["input"]]
    if ids.dim() != 1:
        return
    if task == "causal" and "labels" not in item:
        mask = item.get("attention_mask")
        item["labels"] = ids.clone() if mask is None else torch.where(mask.bool(), ids, ignored)
    elif task == "seq2seq" and about["input"] == "input_ids":
        if "labels" not in item:
            middle = max(ids.shape[0] // 2, 1)
            item["labels"] = ids[middle:].clone()
            for key in ("input_ids", "attention_mask"):
                if key in item:
                    item[key] = item[key][:middle]
        if "decoder_input_ids" not in item:
            item["decoder_input_ids"] = shift_right(item["labels"], about, ignored=ignored)


def shift_right(labels: Tensor, about: Mapping[str, Any], *, ignored: int) -> Tensor:
    """The decoder's input for these targets [T]: start token, then all targets but the last."""
    start = torch.tensor([int(about.get("decoder_start_id") or 0)])
    before = torch.where(labels == ignored, int(about.get("pad_id") or 0), labels)
    return torch.cat((start, before[:-1]))


def mask_tokens(
    ids: Tensor, special: Tensor, mask_id: int, generator: torch.Generator, *, ignored: int
) -> tuple[Tensor, Tensor]:
    """Masked-language-modelling input and labels: 15 % of the ordinary tokens (at least one) become the mask token and
    are scored, the rest is not.

    Args:
        ids: [T]. special: bool [T], tokens that are never masked.
    """
    scores = torch.rand(ids.shape[0], generator=generator).masked_fill(special, 2.0)
    ordinary = int((~special).sum())
    count = min(max(round(0.15 * ordinary), 1), ordinary)
    chosen = torch.zeros_like(special)
    chosen[scores.argsort()[:count]] = True
    return torch.where(chosen, mask_id, ids), torch.where(chosen, ids, ignored)
