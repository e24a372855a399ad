"""How far models agree on inputs, and how sure they are there: without labels, whether they know such inputs.

On inputs like those of the training, two networks name the same class about as often as either is right (Jiang et al.,
Assessing Generalization of SGD via Disagreement, ICLR 2022), and they are right about as often as they are sure, or
more often. On inputs of another kind networks stay sure, but each of something else. So with c how sure they are, a how
often they agree, and r how often they would by chance, the share

    (a − r) / (c − r)

is near 1 or above on inputs of their own kind, and falls where they do not know what they see. Chance counts, since
networks that see nothing that they know often name one and the same class. Of 2,862 sets of 64 to 512 inputs of 477
pairs' own kind (zoo and `examples/no_barrier.py`) none is below 0.7, of networks that have memorised 40 % random
labels none below 0.65. Merges that are solved on other inputs lose by it where the share is below a half
(`mergeid.results.agreement.BORNE_OUT`), and rarely elsewhere. What all models call by one name (BYOB networks do so
with noise) bears out nothing, and is held against the inputs (`ONE_NAME`). Next tokens have many right answers: models
agree on the likeliest far more often than they are sure, so that of text the share is above 1 nearly always.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import sqrt

import torch
from torch import Tensor

from mergeid.basics.memory import few_rows
from mergeid.evaluate.scored import counted_positions, per_example
from mergeid.models.loaded import Loaded
from mergeid.plugins import Batch
from mergeid.results.agreement import Agreement


class Tally:
    """Counts what models say by one classifying output, batch by batch.

    Args:
        first: whose task output it is, for which positions of a sequence count.
        shares: weights of the models; those without any are not asked.
    """

    def __init__(self, first: Loaded, shares: Sequence[float]) -> None:
        self.first = first
        self.asked = {k: share for k, share in enumerate(shares) if share > 0}
        pairs = {(i, j): v * w for (i, v), (j, w) in combinations(self.asked.items(), 2)}
        self.pairs = {pair: weight / sum(pairs.values()) for pair, weight in pairs.items()}
        self._sure: list[Tensor] = []
        self._alike: list[Tensor] = []
        self._named: dict[int, Tensor] = {}

    def add(self, outs: Sequence[Tensor], batch: Batch, count: int) -> None:
        """Logits of every model [..., classes] on a batch of `count` examples."""
        shape, total = outs[0].shape[:-1], sum(self.asked.values())
        sure, choices = [], []
        for parts in few_rows(*outs):
            tops = [p.softmax(-1).max(-1) for p in parts]
            sure.append(sum((w / total * tops[k].values for k, w in self.asked.items()), torch.zeros(())))
            choices.append(torch.stack([top.indices for top in tops]))
        chosen = torch.cat(choices, 1)
        alike = sum((w * (chosen[i] == chosen[j]).double() for (i, j), w in self.pairs.items()), torch.zeros(()))
        for rows, found in ((torch.cat(sure), self._sure), (alike, self._alike)):
            found.append(per_example(rows.reshape(shape), batch, count, self.first).double().cpu())
        counted = counted_positions(batch, shape, self.first)
        real = torch.ones(shape, device=chosen.device) if counted is None else counted
        by_example = real.double().reshape(count if shape[:1] == (count,) else 1, -1)
        weights = (by_example / by_example.sum(1, keepdim=True).clamp(min=1) * count / len(by_example)).flatten()
        for k in self.asked:
            named = torch.bincount(chosen[k], weights, outs[0].shape[-1]).cpu()
            self._named[k] = self._named[k] + named if k in self._named else named

    @property
    def examples(self) -> int:
        """How many were added."""
        return sum(map(len, self._sure))

    def agreement(self) -> Agreement:
        """Of all that was added, of at least two models."""
        sure, alike = torch.cat(self._sure), torch.cat(self._alike)
        often = {k: named / named.sum() for k, named in self._named.items()}
        chance = sum(w * float(often[i] @ often[j]) for (i, j), w in self.pairs.items())
        gap = sure - alike
        error = float(gap.std()) / sqrt(len(gap)) if len(gap) > 1 else float("inf")
        classes = max(map(len, self._named.values()))
        return Agreement(float(sure.mean()), float(alike.mean()), chance, error, len(gap), classes)


def agreement_of(one: Tensor, other: Tensor) -> Agreement:
    """Of two models' logits [rows, classes] on the same inputs, every row alike."""
    tops = [logits.double().softmax(-1).max(-1) for logits in (one, other)]
    often = [torch.bincount(top.indices, minlength=one.shape[-1]).double() / len(one) for top in tops]
    sure = (tops[0].values + tops[1].values) / 2
    alike = (tops[0].indices == tops[1].indices).double()
    gap = sure - alike
    error = float(gap.std()) / sqrt(len(gap)) if len(gap) > 1 else float("inf")
    return Agreement(
        float(sure.mean()), float(alike.mean()), float(often[0] @ often[1]), error, len(gap), one.shape[-1]
    )
