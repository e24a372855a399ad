"""What is said of a pair, as plain numbers and one sentence of advice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mergeid.prediction.bound import Bound
from mergeid.prediction.features import Features, LayerDeviation
from mergeid.prediction.model import Interval, Predictor

FORMAT = "mergeid.predict/1"
SURE = 0.9
"""Probability from which the advice says so."""
NAMED = 3
"""Layers that are named as the cause."""


@dataclass(frozen=True)
class Outlook:
    """One way to merge the pair.

    Attributes:
        assignment: "direct" or "matched". repaired: statistics of normalisation estimated again after the merge.
        nats: of the loss barrier. points: of the accuracy barrier; None where no model predicts it.
        layers: those whose outputs leave the chord most, relative to it, worst first.
    """

    assignment: str
    repaired: bool
    nats: Interval
    points: Interval | None
    layers: list[LayerDeviation]

    @property
    def label(self) -> str:
        return f"{self.assignment}, repaired" if self.repaired else self.assignment

    def to_json(self) -> dict[str, Any]:
        return {
            "assignment": self.assignment,
            "repaired": self.repaired,
            "barrier_nats": self.nats.to_json(),
            "barrier_accuracy_points": self.points.to_json() if self.points else None,
            "layers": [asdict(x) for x in self.layers],
        }


@dataclass
class PredictResult:
    """The barrier expected between two models.

    Attributes:
        mode: "inputs" (run on the given data), "weights" (run on random inputs) or "sketches".
        examples: inputs that both were run on.
        tolerated: loss in nats that the probabilities are of.
        bound: the paper's, with its assumptions; None in the mode "sketches".
    """

    a: str
    b: str
    arch: str
    mode: str
    examples: int
    tolerated: float
    outlooks: list[Outlook]
    bound: Bound | None
    version: str
    notes: list[str] = field(default_factory=list)

    @property
    def best(self) -> Outlook:
        """The way with the lowest expected barrier; ties go to what changes least."""
        return min(self.outlooks, key=lambda o: (o.nats.expected, o.assignment != "direct", o.repaired))

    @property
    def advice(self) -> str:
        return advise(self.outlooks, self.tolerated)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "a": self.a,
            "b": self.b,
            "arch": self.arch,
            "mode": self.mode,
            "examples": self.examples,
            "tolerated": self.tolerated,
            "predictor": self.version,
            "outlooks": [o.to_json() for o in self.outlooks],
            "advice": self.advice,
            "bound": self.bound.to_json() if self.bound else None,
            "notes": self.notes,
        }


def outlook(
    predictor: Predictor,
    mode: str,
    assignment: str,
    repaired: bool,
    features: Features,
    layers: Sequence[LayerDeviation],
    tolerated: float,
) -> Outlook:
    nats = predictor.model(mode, "nats").predict(features, tolerated=tolerated)
    points = predictor.model(mode, "points").predict(features)
    worst = sorted(layers, key=lambda x: -x.deviation)[:NAMED]
    return Outlook(assignment, repaired, nats, points, [x for x in worst if x.deviation > 0])


def advise(outlooks: Sequence[Outlook], tolerated: float) -> str:
    """One sentence: what to do."""
    if not any(o.nats.trusted for o in outlooks):
        return "Cannot tell: the pair is unlike all that the predictor was fitted on; measure it with mergeid barrier."
    ways = {"direct": "as they are", "matched": "after matching their neurons"}
    for o in sorted(outlooks, key=lambda o: (o.assignment != "direct", o.repaired)):
        if o.nats.trusted and (o.nats.within or 0.0) >= SURE:
            repair = ", and estimate the statistics of the normalisation layers again" if o.repaired else ""
            return (
                f"Merge them {ways[o.assignment]}{repair}: a loss of at most {tolerated:g} nats is expected with "
                f"probability {o.nats.within:.2f}."
            )
    best = min(outlooks, key=lambda o: o.nats.expected)
    if min(o.nats.low for o in outlooks) > tolerated:
        return (
            f"Do not average these two: at best ({best.label}) {best.nats.expected:.2g} nats are lost, more than the "
            f"{tolerated:g} tolerated in any case."
        )
    return (
        f"Measure before you merge: at best ({best.label}) {best.nats.expected:.2g} nats are expected to be lost, and "
        f"the interval reaches from {best.nats.low:.2g} to {best.nats.high:.2g}."
    )


MATRIX_FORMAT = "mergeid.predictions/1"


@dataclass(frozen=True)
class PredictionMatrix:
    """Every pair of N sketches.

    Attributes:
        names: of the models. pairs: (i, j), i < j -> what is predicted.
    """

    names: list[str]
    tolerated: float
    pairs: Mapping[tuple[int, int], PredictResult]

    def expected(self) -> list[list[float]]:
        """Barrier in nats under the best assignment, 0 on the diagonal."""
        n = len(self.names)
        return [
            [self.pairs[min(i, j), max(i, j)].best.nats.expected if i != j else 0.0 for j in range(n)] for i in range(n)
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": MATRIX_FORMAT,
            "models": self.names,
            "tolerated": self.tolerated,
            "barrier_nats": self.expected(),
            "pairs": [{"i": i, "j": j, **result.to_json()} for (i, j), result in self.pairs.items()],
        }
