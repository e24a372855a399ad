"""What is said of a pair, as plain numbers and one sentence of advice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mergeid.prediction.bound import Bound
from mergeid.prediction.features import Features, LayerDeviation
from mergeid.prediction.model import Interval, Predictor
from mergeid.prediction.opinions import Opinions
from mergeid.prediction.worth import Interference, Worth
from mergeid.results.comparison import MATCHED
from mergeid.results.trial import SOLVED, Trial

FORMAT = "mergeid.predict/1"
SURE = 0.9
"""Probability from which the advice says so."""
SAYS_ONE_THING = "one of the models makes the same prediction for every {kind}"
NAMED = 3
"""Layers that are named as the cause."""


@dataclass(frozen=True)
class Outlook:
    """One way to merge the pair.

    Attributes:
        assignment: "direct" or "matched". repaired: statistics of normalisation estimated again after the merge.
        nats: of the loss barrier (solved: of the loss at the midpoint beyond the models' mean).
        points: of the accuracy barrier; None where no model predicts it.
        layers: those whose outputs leave the chord most, relative to it, worst first.
        solved: every layer solved after the merge, from this assignment.
        excess: nats that the networks' own runs say are lost; negative where averaging gains.
    """

    assignment: str
    repaired: bool
    nats: Interval
    points: Interval | None
    layers: list[LayerDeviation]
    solved: bool = False
    excess: float = 0.0

    @property
    def change(self) -> float:
        """Nats of loss that the merge is expected to have above the mean of the two models', negative where it has
        less: the interval ends at 0, where what averaging gains goes on."""
        return self.nats.expected if self.nats.expected > 0 else min(self.excess, 0.0)

    @property
    def label(self) -> str:
        """What it is called in tables."""
        if self.solved:
            return "solved"
        return f"{self.assignment}, repaired" if self.repaired else self.assignment

    @property
    def options(self) -> tuple[str, ...]:
        """Those of ``mergeid merge`` that merge in this way."""
        if self.solved:
            return "--repair", "solve"
        match = "never" if self.assignment == "direct" else "always"
        return "--match", match, "--repair", "bn" if self.repaired else "none"

    @property
    def trouble(self) -> tuple[bool, bool, bool]:
        """Sorts ways by what they change, the simplest first."""
        return self.solved, self.assignment != "direct", self.repaired

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "assignment": self.assignment,
            "repaired": self.repaired,
            "solved": self.solved,
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
        bound: that of arXiv 2606.04754, with its assumptions; None in the mode "sketches".
        trials: merges that were made and run (--try), beside what was predicted.
        worth: what both models together would gain over the better one; None without inputs of their kind.
        interference: tensors in which two fine-tunes of a base cancel each other, the worst first.
        behind: nats of loss that B itself has beyond A, where A's predictions, made surer, take the place of labels
            (`mergeid.prediction.features.EndSums`); None where that was not looked at.
        opinions: what both say of the inputs; None under --skip, where B is not run as it is.
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
    trials: list[Trial] = field(default_factory=list)
    worth: Worth | None = None
    interference: list[Interference] = field(default_factory=list)
    behind: float | None = None
    opinions: Opinions | None = None

    def __repr__(self) -> str:
        ways = ", ".join(f"{o.label}: {o.nats.expected:.3g} nats" for o in self.outlooks)
        return f"PredictResult({self.a!r}, {self.b!r}, {ways})"

    @property
    def best(self) -> Outlook:
        """The way with the lowest expected barrier; ties go to what changes least."""
        return min(self.outlooks, key=lambda o: (o.nats.expected, o.trouble))

    @property
    def best_trial(self) -> Trial | None:
        """Of the merges that were made in memory and run, the one that is expected to lose least; where nothing is
        expected of any, the one that lost least. None where none were run."""
        told = [t for t in self.trials if t.expected is not None]
        return min(told or self.trials, key=lambda t: t.lost if t.expected is None else t.expected, default=None)

    @property
    def sure(self) -> Outlook | None:
        """The simplest way that loses no more than is tolerated, with a probability of at least `SURE`."""
        return sure_of(self.outlooks)

    @property
    def advice(self) -> str:
        """What to do, in a sentence: by the trials, where there are any."""
        tried = self.best_trial
        if tried is None:
            return advise(self.outlooks, self.tolerated, "random input" if self.mode == "weights" else "input")
        return advise_tried(tried, self.tolerated)

    @property
    def said_of_worth(self) -> str:
        """One sentence: whether the merge is worth having."""
        if self.worth is None:
            return ""
        w = self.worth
        if w.high <= self.tolerated:
            return (
                f"Both models together would gain at most {in_nats(max(w.high, 0.0))} nats over the better one, so "
                f"little can be gained by merging them."
            )
        gains = f"gain about {in_nats(w.gain)} nats over" if w.gain > 0 else "be no better than"
        kept = ""
        if w.kept is not None and w.gain > 0:
            kept = f", and the best merge tried keeps {w.kept:.0%} of what they gain on average"
        return (
            f"Both models together would {gains} the better one (90 % interval {in_nats(w.low)} to {in_nats(w.high)}, "
            f"without labels){kept}."
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
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
            "trials": [t.to_json() for t in self.trials],
            "ensemble": self.worth.to_json() if self.worth else None,
            "interference": [asdict(i) for i in self.interference],
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Finding:
    """What was found of a pair under one assignment.

    Attributes:
        plain, repaired: features of the merge as averaging writes it, and with statistics of normalisation estimated
            again; None where that cannot be.
    """

    assignment: str
    plain: Features
    repaired: Features | None
    layers: Sequence[LayerDeviation]

    def features(self, repaired: bool) -> Features:
        """Of the merge with or without repair."""
        return self.repaired if repaired and self.repaired is not None else self.plain


def easiest(found: Sequence[Finding]) -> tuple[Finding, Features]:
    """Of all ways that are not solved, the one whose networks' own runs lose least: what a solved merge starts from."""
    ways = ((f, x) for f in found for x in (f.plain, f.repaired) if x is not None)
    return min(ways, key=lambda way: way[1]["excess"])


@dataclass(frozen=True)
class TrialReader:
    """What a trial says of a merge on other inputs, together with what the networks' own runs said before it.

    Attributes:
        found: of the pair, under every assignment. outlooks: what was predicted of it.
    """

    predictor: Predictor
    found: Sequence[Finding]
    outlooks: Sequence[Outlook]
    tolerated: float

    def before_labels(self, trial: Trial) -> Interval | None:
        """What labels correct. Of merges that are not solved it is what was predicted: beside labels the run without
        them says no more, and among fine-tunes it leads astray (`examples/zoo/validation.md`)."""
        if trial.repair in SOLVED:
            return trial.nats
        return next((o.nats for o in self.outlooks if o.label == trial.label), None)

    def nats(self, trial: Trial) -> Interval | None:
        """See `Trial.nats`."""
        way = trial.fitted_way
        model = None if way is None else self.predictor.model("trial", "nats", way)
        if model is None:
            return None
        said = {"hard": trial.hard, "soft": trial.soft, "sharp": trial.sharp, "missed": trial.missed}
        features = easiest(self.found)[1]
        if trial.repair not in SOLVED:
            own = [f for f in self.found if (f.assignment == MATCHED) == (trial.merge == MATCHED)]
            features = own[0].features(way == "repaired") if own else features
        return model.predict({**features, **said}, tolerated=self.tolerated)


def outlooks_of(predictor: Predictor, mode: str, found: Sequence[Finding], tolerated: float) -> list[Outlook]:
    """Every way to merge the pair that the predictor knows in this mode."""
    out: list[Outlook | None] = []
    for f in found:
        out.append(_outlook(predictor, mode, f, f.plain, f.assignment, tolerated))
        if f.repaired is not None:
            out.append(_outlook(predictor, mode, f, f.repaired, "repaired", tolerated))
    best, features = easiest(found)
    known = [o for o in out if o is not None]
    same = any(o.nats.score == -math.inf for o in known)
    if not same:  # else there is nothing to solve
        out.append(_outlook(predictor, mode, best, features, "solved", tolerated))
    return [o for o in out if o is not None]


def _outlook(
    predictor: Predictor, mode: str, found: Finding, features: Features, way: str, tolerated: float
) -> Outlook | None:
    nats, points = (predictor.model(mode, unit, way) for unit in ("nats", "points"))
    if nats is None:
        return None
    worst = sorted(found.layers, key=lambda x: -x.deviation)[:NAMED]
    return Outlook(
        found.assignment,
        way == "repaired",
        nats.predict(features, tolerated=tolerated),
        None if points is None else points.predict(features),
        [x for x in worst if x.deviation > 0],
        way == "solved",
        features["excess"],
    )


def in_nats(value: float) -> str:
    """A loss as sentences say it: two digits that count, and nothing below a thousandth."""
    if abs(value) >= 10:
        return f"{value:.0f}"
    return f"{value:.2g}" if abs(value) >= 0.01 else f"{round(value, 3) + 0.0:.3f}".rstrip("0").rstrip(".")


def sure_of(outlooks: Sequence[Outlook]) -> Outlook | None:
    """See `PredictResult.sure`."""
    sure = [o for o in outlooks if o.nats.trusted and (o.nats.within or 0.0) >= SURE]
    return min(sure, key=lambda o: o.trouble, default=None)


def advise(outlooks: Sequence[Outlook], tolerated: float, kind: str = "input") -> str:
    """One sentence: what to do; `kind`: of inputs that the models ran on."""
    known = [o for o in outlooks if o.nats.trusted]
    if not known:
        why = SAYS_ONE_THING.format(kind=kind)
        if not any(o.nats.collapsed for o in outlooks):
            why = "the pair is unlike anything that the predictor was fitted on"
        return cannot_tell(why)
    if (sure := sure_of(known)) is not None:
        way = {"direct": "as is", "matched": "after matching their neurons"}[sure.assignment]
        more = " and re-estimate the normalisation statistics" if sure.repaired else ""
        more = " and solve the layers" if sure.solved else more
        return (
            f"Merge them {way}{more}: a loss of at most {tolerated:g} nats is expected with probability "
            f"{sure.nats.within:.2f}."
        )
    best = min(known, key=lambda o: (o.nats.expected, o.trouble))
    if min(o.nats.low for o in known) > tolerated:
        return (
            f"Do not average these two: even the best way ({best.label}) is expected to lose "
            f"{in_nats(best.nats.expected)} nats, more than the {tolerated:g} tolerated."
        )
    return (
        f"Measure before you merge: the best way ({best.label}) is expected to lose {in_nats(best.nats.expected)} nats "
        f"(90 % interval {in_nats(best.nats.low)} to {in_nats(best.nats.high)})."
    )


def cannot_tell(why: str) -> str:
    """One sentence: no merge is advised, and why."""
    return f"Cannot tell: {why}; measure what a merge loses."


def advise_tried(best: Trial, tolerated: float) -> str:
    """One sentence: what to do after trials, of which this was the best."""
    if best.says_nothing:
        return cannot_tell(SAYS_ONE_THING.format(kind="input"))
    nats = best.trusted if best.labelled is None else None
    if nats is None:
        gains = in_nats(best.lost).startswith("-")
        lost = f"{'gains' if gains else 'loses'} {in_nats(abs(best.lost))} nats in a trial"
        if best.lost <= tolerated:
            return f"Merge them: the best way ({best.label}) {lost}."
        more = f"more than the {tolerated:g} tolerated"
        return f"Merge them with care: even the best way ({best.label}) {lost}, {more}."
    if (nats.within or 0.0) >= SURE:
        sure_gain = in_nats(nats.high).startswith("-")
        gain = f"gain {in_nats(-nats.expected)} nats over the models' mean, and to " if sure_gain else ""
        return (
            f"Merge them: after its trial, the best way ({best.label}) is expected to {gain}lose at most "
            f"{tolerated:g} nats with probability {nats.within:.2f}."
        )
    even, more = ("even ", f", more than the {tolerated:g} tolerated") if nats.low > tolerated else ("", "")
    care = "" if nats.high <= tolerated else " with care"
    gains = in_nats(nats.expected).startswith("-")
    verb, ends = ("gain", (-nats.high, -nats.low)) if gains else ("lose", (nats.low, nats.high))
    return (
        f"Merge them{care}: after its trial, {even}the best way ({best.label}) is expected to {verb} "
        f"{in_nats(abs(nats.expected))} nats (90 % interval {in_nats(ends[0])} to {in_nats(ends[1])}){more}."
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
        """Everything, as plain values."""
        return {
            "format": MATRIX_FORMAT,
            "models": self.names,
            "tolerated": self.tolerated,
            "barrier_nats": self.expected(),
            "pairs": [{"i": i, "j": j, **result.to_json()} for (i, j), result in self.pairs.items()],
        }
