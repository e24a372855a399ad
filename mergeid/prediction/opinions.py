"""What a model and its candidates say of the same inputs, kept small, and what each of them loses by it.

Whether a candidate is better than the model cannot be told by the two alone: where they differ, either may be right. Of
many fine-tunes those that lie near the model mostly err in different places, so that their mean is right more often
than the model is. Together with the model's own predictions it takes the place of labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mergeid.prediction.features import SHARP, expected, rows_of

POSITIONS, CLASSES = 16, 16
"""Most positions of an example, evenly spaced, and most classes of a position, the model's likeliest, that are kept."""
NEAR, APART, SURER = 0.5, 0.1, 2.0
"""Most of all models whose mean is taken (a share, the nearest ones), how far their predictions may lie from the
model's (nats), and the power that the mean is raised to. Candidates for another task are not asked."""
SAME = 0.01
"""Up to which log-probabilities are taken to be those of one model."""


@dataclass
class Opinions:
    """Log-probabilities that A and B give to A's likeliest classes and, last, to all others together.

    Attributes:
        a, b: float32 [rows, classes], batch by batch; weights: share of every row in its example, float64 [rows].
    """

    a: list[Tensor] = field(default_factory=list)
    b: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"Opinions({sum(map(len, self.a))} rows)"

    def add(self, a: Tensor, b: Tensor, mask: Tensor | None) -> None:
        """Outputs [examples, …, classes]; mask: bool [examples, positions] of positions that count."""
        a, b = (t.flatten(1, -2) if t.dim() > 2 else t[:, None] for t in (a, b))
        if a.shape[1] > POSITIONS:
            kept = torch.linspace(0, a.shape[1] - 1, POSITIONS, device=a.device).round().long()
            mask = mask[:, kept] if mask is not None and mask.shape == a.shape[:2] else None
            a, b = a[:, kept], b[:, kept]
        for (x, y), weight in rows_of((a, b), mask):
            index = x.topk(min(CLASSES, x.shape[-1])).indices
            self.a.append(_told(x, index))
            self.b.append(_told(y, index))
            self.weights.append(weight.cpu())

    def logs(self) -> tuple[Tensor, Tensor]:
        """Of A and of B, float64 [rows, classes]."""
        return torch.cat(self.a).double(), torch.cat(self.b).double()


def behind(opinions: Sequence[Opinions]) -> list[float] | None:
    """Nats of loss of every candidate beyond the model's own, by what `labels` says; negative where it is less.

    Args:
        opinions: of one model, A, with every candidate, B, on the same inputs.

    Returns:
        None where they are not of one model and the same inputs, or of none."""
    if not opinions or not all(each.a for each in opinions):
        return None
    weights = torch.cat(opinions[0].weights)
    known = [each.logs() for each in opinions]
    own = known[0][0]
    if not all(a.shape == own.shape and torch.allclose(a, own, atol=SAME) for a, _ in known):
        return None
    q, total = labels(own, [b for _, b in known], weights), float(weights.sum())
    return [float((expected(q, own - b) * weights).sum()) / total for _, b in known]


def labels(own: Tensor, others: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Half the model's own predictions, half the mean of those that are nearest to them, both made surer.

    Args:
        own, others: log-probabilities, float64 [rows, classes]. weights: of the rows.

    Returns:
        probabilities, float64 [rows, classes]."""
    p = own.exp()
    apart = [float((expected(p, own - b) * weights).sum() / weights.sum()) for b in others]
    nearest = sorted(range(len(others)), key=lambda i: apart[i])[: max(int(NEAR * (len(others) + 1)) - 1, 0)]
    nearest = [i for i in nearest if apart[i] <= APART]
    mean = (p + sum((others[i].exp() for i in nearest), torch.zeros_like(p))) / (1 + len(nearest))
    power = SURER if nearest else SHARP  # the model alone
    return ((SHARP * own).softmax(-1) + (power * mean.log()).softmax(-1)) / 2


def _told(x: Tensor, index: Tensor) -> Tensor:
    """float32 [rows, classes]: log-probabilities of the classes at `index` and of the rest."""
    logs = x.log_softmax(-1)
    kept = logs.gather(-1, index)
    if kept.shape[-1] < x.shape[-1]:
        rest = (1 - kept.exp().sum(-1, keepdim=True)).clamp(min=1e-12).log()
        kept = torch.cat([kept, rest], -1)
    return kept.float().cpu()
