"""Is it worth it? What running both models and averaging their predictions would gain over the better one, and what the
merge keeps of it. No labels are used.

If the truth is as both models say together, m = (p_a + p_b) / 2, the ensemble gains KL(m, p_i) nats over model i, and
as much accuracy as m puts on its own choice more than on the model's (`mergeid.prediction.trial.TogetherSums`). Which
of two models is the better one is hardly told without labels, and the truth is not m: by how much that is wrong was
measured on the zoo (`Shares`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mergeid.basics.on_demand import in_pieces
from mergeid.prediction.features import Features


@dataclass(frozen=True)
class Shares:
    """What was gained over the better model, over what these figures say: median and 90 % interval on the zoo."""

    expected: float = 1.0
    low: float = -1.0
    high: float = 2.0


@dataclass(frozen=True)
class Worth:
    """Attributes:
    gain, low, high: nats that the ensemble gains over the better model, with a 90 % interval; negative: it loses.
    points: accuracy points that it would gain if the truth were as both say together.
    agreed: share of the inputs that both models name the same class for.
    kept: share of the ensemble's gain over the models' mean that the merge keeps, in [0, 1]; None where no merge was
        made or predicted.
    """

    gain: float
    low: float
    high: float
    points: float
    agreed: float
    kept: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def worth_of(together: Features, shares: Shares, excess: Sequence[float] = ()) -> Worth:
    """Args:
    together: of `TogetherSums`.
    excess: nats that each merge loses beyond the models' mean, negative where it gains."""
    least = min(together["apart_a"], together["apart_b"])
    mean = (together["apart_a"] + together["apart_b"]) / 2
    points = 100 * (together["right_both"] - max(together["right_a"], together["right_b"]))
    kept = None
    if excess and mean > 0:
        kept = min(max(-min(excess) / mean, 0.0), 1.0)
    # one half of the ensemble is the better model, and no loss falls below 0
    ends = -math.log(2), least + together["entropy"]
    low, gain, high = (min(max(s * least, ends[0]), ends[1]) for s in (shares.low, shares.expected, shares.high))
    return Worth(gain, low, high, max(points, 0.0), together["agreed"], kept)


@dataclass(frozen=True)
class Interference:
    """How two fine-tunes of one base get into each other's way in one tensor.

    Attributes:
        cosine: of the two task vectors.
        against: share of their entries' smaller magnitudes in which they point apart: what averaging cancels.
        share: of the squared length of both task vectors that lies in this tensor.
    """

    layer: str
    cosine: float
    against: float
    share: float


def interference_of(a: Mapping[str, Any], b: Mapping[str, Any], base: Mapping[str, Any]) -> list[Interference]:
    """Tensors that both fine-tunes changed, those first in which most is cancelled.

    Args:
        a, b, base: state dicts in one order of neurons."""
    found, total = [], 0.0
    for name, x in a.items():
        y, origin = b.get(name), base.get(name)
        if y is None or origin is None or not x.is_floating_point() or not x.shape == y.shape == origin.shape:
            continue
        sums = torch.zeros(5, dtype=torch.float64)
        for part in in_pieces(x, y, origin):
            one, two = (t.double() - part[2].double() for t in part[:2])
            smaller, product = one.abs().minimum(two.abs()), one * two
            new = (one.square(), two.square(), product, smaller[product < 0], smaller)
            sums += torch.stack([t.sum().cpu() for t in new])
        one_squared, two_squared, dot, apart, least = sums.tolist()
        total += one_squared + two_squared
        if min(one_squared, two_squared) == 0:
            continue
        cosine = dot / (one_squared * two_squared) ** 0.5
        found.append(Interference(name, cosine, apart / max(least, 1e-300), one_squared + two_squared))
    scaled = [Interference(f.layer, f.cosine, f.against, f.share / total) for f in found]
    return sorted(scaled, key=lambda f: -f.against * f.share)
