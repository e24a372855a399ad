"""What a merged network, once it is there, says on the models' own inputs: a trial, no prediction.

Labels are what the models say together, m = (p_a + p_b) / 2: hard ones are its most probable class, soft ones m itself,
sharp ones m to the power `SHARP`.
Against them the merged network loses more than the models do on average, or less. True labels take their place where
they are known. Outputs are read as logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mergeid.prediction.features import SHARP, Features, Sums, expected, rows_of


class TrialSums(Sums):
    """Excess of the merged network's loss over the mean of the models' own, nats, and its shortfall in accuracy."""

    def add(self, a: Tensor, b: Tensor, merged: Tensor, mask: Tensor | None) -> None:
        """Outputs [examples, …, classes]; mask: bool [examples, positions] of positions that count."""
        self.count += len(a)
        for rows, weight in rows_of((a, b, merged), mask):
            logs = [r.log_softmax(-1) for r in rows]
            mixed = torch.logaddexp(logs[0], logs[1]) - math.log(2)
            gap = (logs[0] + logs[1]) / 2 - logs[2]
            best = mixed.argmax(-1, keepdim=True)
            right = [(r.argmax(-1, keepdim=True) == best).double()[..., 0] for r in logs]
            self.gather(
                {
                    "hard": gap.gather(-1, best)[..., 0],
                    "soft": expected(mixed.exp(), gap),
                    "sharp": expected((SHARP * mixed).softmax(-1), gap),
                    "beyond": expected((SHARP * rows[0]).softmax(-1), logs[0] - logs[2]),
                    "missed": (right[0] + right[1]) / 2 - right[2],
                },
                weight,
            )

    def features(self) -> Features:
        """`hard`, `soft`, `sharp`: nats; `beyond`: nats lost beyond A alone, by A's predictions to the power `SHARP`;
        `missed`: share of the hard labels."""
        return self.means()


class TogetherSums(Sums):
    """What running both models and averaging their predictions would gain, if the truth were as they say together.

    The loss of model i beyond that of the mean prediction is then KL(m, p_i), and its accuracy is the mean of m at what
    it says."""

    def add(self, a: Tensor, b: Tensor, mask: Tensor | None) -> None:
        """As `TrialSums.add`."""
        self.count += len(a)
        for rows, weight in rows_of((a, b), mask):
            logs = [r.log_softmax(-1) for r in rows]
            mixed = torch.logaddexp(logs[0], logs[1]) - math.log(2)
            m = mixed.exp()
            said = [r.argmax(-1, keepdim=True) for r in logs]
            found = {f"apart_{n}": expected(m, mixed - r) for n, r in zip("ab", logs, strict=True)}
            found |= {f"right_{n}": m.gather(-1, s)[..., 0] for n, s in zip("ab", said, strict=True)}
            found["entropy"] = -expected(m, mixed)
            found["right_both"] = m.max(-1).values
            found["agreed"] = (said[0] == said[1]).double()[..., 0]
            self.gather(found, weight)

    def features(self) -> Features:
        """`apart_a`, `apart_b`, and `entropy` of what both say together: nats; the others: shares."""
        return self.means()
