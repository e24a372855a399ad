"""Which of several models to trust where they differ, as far as their predictions tell without labels.

The surest one: a model that knows more is surer, and networks that were trained alike are about equally right about
how sure they may be. In the zoo (`examples/zoo`), of 77 independent pairs whose losses differ by more than 0.02 nats,
the better model is the one whose predictions have less entropy in 67. But a model may be sure of nonsense. So its
choices must be worth about as much as the others' to all models together: the mean probability that the mixture gives
to the class that it would name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from mergeid.basics.memory import few_rows
from mergeid.evaluate.nearness import classifying
from mergeid.evaluate.scored import per_example

if TYPE_CHECKING:
    from mergeid.models.loaded import Loaded
    from mergeid.plugins import Batch

DOUBTED = 0.05
"""Mean probability by which a model's choices may be worth less to the mixture than the best one's."""
SAME = 1e-9
"""Difference of two means that is rounding."""


@torch.no_grad()
def most_trusted(first: Loaded, models: Sequence[nn.Module], shares: Sequence[float], batches: Iterable[Batch]) -> int:
    """The number of the model whose predictions have the least entropy, of those whose choices all of them together do
    not find unlikely; the first of equals, and where no output classifies.

    Args:
        first: how the models are run.
        models: in eval mode, on the batches' device.
        shares: weights of their predictions.
        batches: whose labels, if there are any, say which positions count.
    """
    heads = classifying(first)
    weights = torch.tensor(shares, dtype=torch.float64).clamp(min=0)
    total, count = torch.zeros(2, len(models), dtype=torch.float64), 0
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
                worth = mixed.expand_as(each).gather(-1, each.argmax(-1, keepdim=True))[..., 0]
                found.append(torch.stack([worth, torch.special.entr(each).sum(-1)]))
            rows, size = torch.cat(found, -1).reshape(2, len(models), *outs[0].shape[:-1]), len(outs[0])
            total += torch.stack(
                [torch.stack([per_example(r, batch, size, first).sum() for r in of]) for of in rows]
            ).cpu()
            count += size
    worth, entropy = total / max(count, 1)
    doubted = worth < worth.max() - DOUBTED
    least = entropy[~doubted].min()
    return int(torch.nonzero((entropy <= least + SAME) & ~doubted)[0])
