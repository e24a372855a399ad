"""What is known of a pair before it is merged, as numbers that the predictor weighs.

All of it comes from the two networks' own runs (`mergeid.prediction.lockstep`) and weights. Outputs are read as logits
z with log-partition Z, Z(z) = log Σ exp z. The loss of averaged logits differs from the mean of the two networks'
losses by Z((a + b) / 2) - (Z(a) + Z(b)) / 2 ≤ 0 whatever the labels are: that part of the barrier needs none. What
averaging weights shifts beyond averaged logits does; there the labels are taken as the averaged logits say, p =
softmax((a + b) / 2), against which every shift is a loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mergeid.basics.memory import few_rows
from mergeid.basics.squares import squares_of
from mergeid.errors import MergeidError
from mergeid.prediction.lockstep import Deviation

Features = dict[str, float]
SHARE = 0.7
"""Of the shift against p in what is expected of the loss. Chosen on the zoo: with true labels shifts are twice as large
for language models and half as large for networks that are wrong with confidence."""
SHARP = 1.5
"""Power of the predictions that sharper labels are: trained networks are mostly less sure than they are right."""


@dataclass
class Sums:
    """Sums over examples, float64; positions count as shares of their example."""

    count: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def gather(self, found: Mapping[str, Tensor], weight: Tensor) -> None:
        for name, values in found.items():
            self.sums[name] = self.sums.get(name, 0.0) + float((values * weight).sum())

    def means(self) -> dict[str, float]:
        return {k: v / max(self.count, 1) for k, v in self.sums.items()}


@dataclass
class EndSums(Sums):
    """What two networks' own outputs say."""

    means_of: tuple[Tensor, Tensor] | None = None
    """Sums of both networks' predictions, float64 [classes]."""

    def add(self, a: Tensor, b: Tensor, mask: Tensor | None) -> None:
        """Outputs [examples, …, classes]; mask: bool [examples, positions] of positions that count."""
        if self.means_of is not None and len(self.means_of[0]) != a.shape[-1]:
            raise MergeidError(
                f"the outputs have {len(self.means_of[0])} classes for some inputs and {a.shape[-1]} for others; a "
                "barrier in nats can only be predicted for logits of fixed classes"
            )
        self.count += len(a)
        for (x, y), weight in rows_of((a, b), mask):
            lx, ly = x.log_softmax(-1), y.log_softmax(-1)
            entropy = torch.special.entr((lx.exp() + ly.exp()) / 2).sum(-1)
            apart = [torch.special.entr(z.exp()).sum(-1) for z in (lx, ly)]
            own = (apart[0] + apart[1]) / 2
            parts = (x.logsumexp(-1) + y.logsumexp(-1)) / 2
            labels = (SHARP * x).softmax(-1)
            found = {
                "behind": expected(labels, lx - ly),
                "excess_averaged": ((x + y) / 2).logsumexp(-1) - parts,
                "own_entropy": own,
                "divergence": entropy - own,
                "entropy_a": apart[0],
                "entropy_b": apart[1],
            }
            self.gather(found, weight)
            sums = (weight @ lx.exp(), weight @ ly.exp())
            known = self.means_of
            self.means_of = sums if known is None else (known[0] + sums[0], known[1] + sums[1])

    def features(self) -> Features:
        """Nats; `behind`: what B loses beyond A, where A's predictions to the power `SHARP` take the place of labels;
        `divergence`: of Jensen and Shannon; `uniform`: what a uniform guess loses; `told`: the least that one of the
        networks tells of its input (mutual information), over that, ≥ 0: 0 where its predictions are the same for
        every input."""
        found = self.means()
        if self.means_of is None:
            return found
        # a class that both rule out is none
        uniform = math.log(max(int((self.means_of[0] + self.means_of[1] > 0).sum()), 2))
        told = []
        for total, name in zip(self.means_of, ("entropy_a", "entropy_b"), strict=True):
            whole = float(torch.special.entr(total / total.sum().clamp(min=1e-12)).sum())
            told.append(max(whole - found.pop(name), 0.0) / uniform)
        return {**found, "uniform": uniform, "told": min(told)}


class ShiftSums(Sums):
    """What the corrected runs shift, beyond the mean of the two networks' own logits.

    `shift`: rise of the loss against p, the mean of both runs; `shift_sharp`: against the mean prediction to the power
    `SHARP`."""

    def add(self, a: Tensor, b: Tensor, middle: tuple[Tensor, Tensor], mask: Tensor | None) -> None:
        """As `EndSums.add`, with the outputs of the two corrected runs."""
        self.count += len(a)
        for (x, y, *runs), weight in rows_of((a, b, *middle), mask):
            average = (x + y) / 2
            mixed = torch.logaddexp(x.log_softmax(-1), y.log_softmax(-1))
            logs = [r.log_softmax(-1) for r in (average, *runs)]
            found = {
                name: expected(labels.softmax(-1), logs[0] - (logs[1] + logs[2]) / 2)
                for name, labels in (("shift", average), ("shift_sharp", SHARP * mixed))
            }
            self.gather(found, weight)

    def features(self) -> Features:
        """Nats."""
        return self.means()


def expected(chances: Tensor, values: Tensor) -> Tensor:
    """Σ p x over the last dimension. What has no chance counts nothing, whatever its value: of a class that is ruled
    out (a logit of -inf) differences are no numbers."""
    return (chances * values).masked_fill(chances == 0, 0.0).sum(-1)


def rows_of(outputs: tuple[Tensor, ...], mask: Tensor | None) -> Iterator[tuple[list[Tensor], Tensor]]:
    """float64 [rows, classes] of every output, a few rows at a time, and the share of every row in its example.
    Rows that do not count are left out: they may hold anything."""
    n, classes = len(outputs[0]), outputs[0].shape[-1]
    weight = torch.ones(n, outputs[0].numel() // (n * classes), dtype=torch.float64, device=outputs[0].device)
    if mask is not None and mask.shape == weight.shape:
        weight = mask.to(weight)
    left = (weight / weight.sum(1, keepdim=True).clamp(min=1)).reshape(-1)
    for part in few_rows(*(t.detach() for t in outputs)):
        shares, left = left[: len(part[0])], left[len(part[0]) :]
        counts = shares > 0
        yield (part, shares) if bool(counts.all()) else ([t[counts] for t in part], shares[counts])


def output_features(ends: Features, shifts: Features) -> Features:
    """Both, and the rise of the loss over the mean of the two networks' (`excess`)."""
    return {**ends, **shifts, "excess": ends["excess_averaged"] + SHARE * shifts["shift"]}


@dataclass(frozen=True)
class LayerDeviation:
    """One layer's part in the barrier.

    Attributes:
        layer: name of its weight.
        deviation: mean square of the chord deviation over the variance of the chord.
        difference: mean square of half the difference of the two networks' outputs over the same.
        lost: share of the variance of the outputs that averaging them removes, in [0, 1].
    """

    layer: str
    deviation: float
    difference: float
    lost: float


def layer_deviations(sums: list[Deviation]) -> list[LayerDeviation]:
    """Operations with a variance, in order of execution; those of one tensor are added up."""
    merged: dict[str, Deviation] = {}
    for one in sums:
        name = next((w for w in one.weights if w.endswith("weight")), one.weights[0])
        total = merged.setdefault(name, Deviation(one.weights))
        for key in ("deviation", "difference", "chord", "own"):
            setattr(total, key, getattr(total, key) + getattr(one, key))
    found = []
    for name, s in merged.items():
        if s.chord > 1e-12 and s.own > 0:
            lost = max(0.0, 1 - s.chord / s.own)
            found.append(LayerDeviation(name, s.deviation / s.chord, s.difference / s.chord, lost))
    return found


def depth_features(layers: list[LayerDeviation]) -> Features:
    """Over all layers."""
    return {"deviation": math.sqrt(sum(x.deviation for x in layers))}


def weight_features(a: Mapping[str, Any], b: Mapping[str, Any]) -> Features:
    """Distance over the root mean square norm, and cosine, of all matrices and kernels together, and the largest
    distance of one."""
    dot = squares_a = squares_b = worst = 0.0
    for name, x in a.items():
        y = b.get(name)
        if y is None or not x.is_floating_point() or x.dim() < 2:
            continue
        aa, bb, dd = squares_of(x, y)
        if not math.isfinite(dd):  # a mask
            continue
        ab = (aa + bb - dd) / 2
        if aa > 0 and bb > 0:
            worst = max(worst, math.sqrt(dd / ((aa + bb) / 2)))
        dot, squares_a, squares_b = dot + ab, squares_a + aa, squares_b + bb
    if not squares_a * squares_b > 0:
        return {"distance": 0.0, "cosine": 1.0, "distance_worst": 0.0}
    return {
        "distance": math.sqrt(max(squares_a + squares_b - 2 * dot, 0.0) / ((squares_a + squares_b) / 2)),
        "cosine": dot / math.sqrt(squares_a * squares_b),
        "distance_worst": worst,
    }
