"""What is known of a pair before it is merged, as numbers that the predictor weighs.

All of it comes from the two networks' own runs (`mergeid.predict.lockstep`) and weights. Outputs are read as logits;
the label that they are scored against is the mean of the two networks' predictions, so that no true label is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mergeid.predict.lockstep import Deviation, sum_of_squares

Features = dict[str, float]


@dataclass
class OutputSums:
    """Sums over examples (positions count as shares of their example), float64.

    With q the mean of the two predictions: `ends`, the mean cross-entropy of the two networks against q; `middle`, that
    of the mean logits of the corrected runs; `apart`, the mean of the two corrected runs' own; `averaged`, that of the
    mean of the two networks' own logits; `divergence`, the Jensen-Shannon divergence of the two predictions. `right_*`:
    the probability by q of what is predicted; `soft_*`: by q of what is drawn from a prediction; `flips`: of the first
    minus that of the second class, times the chance that a change as large as the corrected runs', in a random
    direction, brings the second before the first. `shift_square`: of the rise of the loss per example.
    """

    count: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    mean: Tensor | None = None

    def add(self, a: Tensor, b: Tensor, middle: tuple[Tensor, Tensor], mask: Tensor | None) -> None:
        """Outputs [examples, …, classes]; mask: bool [examples, positions] of positions that count."""
        n = len(a)
        a, b, ma, mb = (t.detach().double().reshape(n, -1, t.shape[-1]) for t in (a, b, *middle))
        weight = torch.ones(a.shape[:2], dtype=torch.float64, device=a.device)
        if mask is not None and mask.shape == weight.shape:
            weight = mask.to(weight)
        weight = weight / weight.sum(1, keepdim=True).clamp(min=1)
        la, lb = a.log_softmax(-1), b.log_softmax(-1)
        q = (la.exp() + lb.exp()) / 2
        centre, average = (ma + mb) / 2, (a + b) / 2
        entropy = torch.special.entr(q).sum(-1)
        own = [torch.special.entr(t.exp()).sum(-1) for t in (la, lb)]

        def against(log: Tensor) -> Tensor:
            return -(q * log).sum(-1)

        def right(logits: Tensor) -> Tensor:
            return q.gather(-1, logits.argmax(-1, keepdim=True))[..., 0]

        def soft(log: Tensor) -> Tensor:
            return (q * log.exp()).sum(-1)

        likely, which = q.topk(2, -1)
        first, second = average.gather(-1, which).unbind(-1)

        def flips(logits: Tensor) -> Tensor:
            change = logits - average
            size = (change - change.mean(-1, keepdim=True)).square().mean(-1).sqrt()
            chance = torch.special.ndtr((second - first) / (math.sqrt(2) * size).clamp(min=1e-12))
            return (likely[..., 0] - likely[..., 1]) * chance

        found = {
            "ends": (against(la) + against(lb)) / 2,
            "middle": against(centre.log_softmax(-1)),
            "apart": (against(ma.log_softmax(-1)) + against(mb.log_softmax(-1))) / 2,
            "averaged": against(average.log_softmax(-1)),
            "entropy": entropy,
            "divergence": entropy - (own[0] + own[1]) / 2,
            "soft_ends": (soft(la) + soft(lb)) / 2,
            "soft_apart": (soft(ma.log_softmax(-1)) + soft(mb.log_softmax(-1))) / 2,
            "flips": (flips(ma) + flips(mb)) / 2,
            "right_ends": (right(a) + right(b)) / 2,
            "right_middle": right(centre),
            "right_apart": (right(ma) + right(mb)) / 2,
            "agree": (a.argmax(-1) == b.argmax(-1)).double(),
            "logit_shift": (centre - average).square().sum(-1),
            "signal": (average - average.mean(-1, keepdim=True)).square().sum(-1),
            "centre": (centre - centre.mean(-1, keepdim=True)).square().sum(-1),
            "spread": ((a - b) / 2).square().sum(-1),
        }
        shift = ((found["apart"] - found["averaged"]) * weight).sum(1)
        found = {name: (values * weight).sum(1) for name, values in found.items()} | {"shift_square": shift.square()}
        for name, values in found.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(values.sum())
        part = (q * weight[..., None]).sum((0, 1)).cpu()
        self.mean = part if self.mean is None else self.mean + part
        self.count += n

    def features(self) -> Features:
        """Losses in nats, accuracies as shares."""
        s = {k: v / max(self.count, 1) for k, v in self.sums.items()}
        assert self.mean is not None
        shift = s["apart"] - s["averaged"]
        flat = float(torch.special.entr(self.mean / max(self.count, 1)).sum())
        return {
            "excess": s["middle"] - s["ends"],
            "excess_apart": s["apart"] - s["ends"],
            "excess_averaged": s["averaged"] - s["ends"],
            "shift": s["middle"] - s["averaged"],
            "shift_apart": shift,
            "ceiling": flat - s["ends"],
            "ends": s["ends"],
            "entropy": s["entropy"],
            "divergence": s["divergence"],
            "drop": s["right_ends"] - s["right_middle"],
            "drop_apart": s["right_ends"] - s["right_apart"],
            "soft_drop": s["soft_ends"] - s["soft_apart"],
            "flips": s["flips"],
            "shift_error": math.sqrt(max(s["shift_square"] - shift**2, 0.0) / max(self.count, 1)),
            "disagree": 1 - s["agree"],
            "logit_shift": s["logit_shift"] / max(s["signal"], 1e-12),
            "logit_gain": s["centre"] / max(s["signal"], 1e-12),
            "logit_spread": s["spread"] / max(s["signal"], 1e-12),
        }


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
    """Sums, means and extremes over the layers."""
    if not layers:
        return {"deviation": 0.0, "deviation_worst": 0.0, "lost": 0.0, "lost_last": 0.0, "difference": 0.0}
    return {
        "deviation": math.sqrt(sum(x.deviation for x in layers)),
        "deviation_worst": math.sqrt(max(x.deviation for x in layers)),
        "lost": sum(-math.log(max(1 - x.lost, 1e-6)) for x in layers) / len(layers),
        "lost_last": layers[-1].lost,
        "difference": math.sqrt(sum(x.difference for x in layers) / len(layers)),
    }


def weight_features(a: Mapping[str, Any], b: Mapping[str, Any]) -> Features:
    """Distance over the mean norm, and cosine, of matrices and kernels, over all of them together and in the median."""
    dot = squares_a = squares_b = 0.0
    distances, cosines = [], []
    for name, x in a.items():
        y = b.get(name)
        if y is None or not x.is_floating_point() or x.dim() < 2:
            continue
        x, y = (t.float() if t.element_size() < 4 else t for t in (x, y))
        aa, bb, dd = sum_of_squares(x), sum_of_squares(y), sum_of_squares(x - y)
        ab = (aa + bb - dd) / 2
        if aa > 0 and bb > 0:
            distances.append(math.sqrt(dd / ((aa + bb) / 2)))
            cosines.append(ab / math.sqrt(aa * bb))
        dot, squares_a, squares_b = dot + ab, squares_a + aa, squares_b + bb
    if not distances:
        return {"distance": 0.0, "cosine": 1.0, "distance_median": 0.0, "distance_worst": 0.0, "cosine_least": 1.0}
    half = sorted(distances)[len(distances) // 2]
    return {
        "distance": math.sqrt(max(squares_a + squares_b - 2 * dot, 0.0) / ((squares_a + squares_b) / 2)),
        "cosine": dot / math.sqrt(squares_a * squares_b),
        "distance_median": half,
        "distance_worst": max(distances),
        "cosine_least": min(cosines),
        "length_ratio": abs(math.log(squares_a / squares_b)) / 2,
    }
