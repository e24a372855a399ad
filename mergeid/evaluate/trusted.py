"""Which of several models to trust where they differ, as far as their predictions tell without labels.

A model's choices are worth what all models together think of them: the mean probability that the mixture gives to
the class that it would name. In the zoo (`examples/zoo`), of 65 independent pairs whose losses differ by more than 0.02
nats, the better model is the one with more of that in 52.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from mergeid.basics.memory import few_rows
from mergeid.evaluate.nearness import classifying, per_example

if TYPE_CHECKING:
    from mergeid.models.loaded import Loaded
    from mergeid.plugins import Batch

SAME = 1e-9
"""Difference of two means that is rounding."""


@torch.no_grad()
def most_trusted(first: Loaded, models: Sequence[nn.Module], shares: Sequence[float], batches: Iterable[Batch]) -> int:
    """The number of the model whose choices all of them together find likeliest; the first of equals, and where no
    output classifies.

    Args:
        first: how the models are run.
        models: in eval mode, on the batches' device.
        shares: weights of their predictions.
        batches: without labels.
    """
    heads = classifying(first)
    weights = torch.tensor(shares, dtype=torch.float64).clamp(min=0)
    total = torch.zeros(len(models), dtype=torch.float64)
    for batch in batches:
        said = [first.outputs(model, batch) for model in models]
        for name in heads & said[0].keys():
            outs = [out[name] for out in said]
            if outs[0].shape[-1] < 2:
                continue
            found = []
            for parts in few_rows(*outs):
                each = torch.stack([p.double().softmax(-1) for p in parts])
                mixed = torch.einsum("m,mrc->rc", weights.to(each.device) / weights.sum(), each)
                found.append(mixed.expand_as(each).gather(-1, each.argmax(-1, keepdim=True))[..., 0])
            right = torch.cat(found, 1).reshape(len(models), *outs[0].shape[:-1])
            count = len(outs[0])
            total += torch.stack([per_example(r, batch, count).sum().cpu() for r in right])
    return int(torch.nonzero(total >= total.max() - SAME * max(float(total.max()), 1.0))[0])
