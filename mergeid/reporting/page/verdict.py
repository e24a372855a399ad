"""The sentence that a page begins with, and the figures under it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeid.reporting.tables import percent

if TYPE_CHECKING:
    from mergeid.reporting.page.content import Report
    from mergeid.results.barrier import BarrierResult
    from mergeid.results.merge import MergeResult

SMALL, LARGE = 0.02, 0.5
"""Nats above the models' mean loss up to which a merge costs next to nothing, and beyond which it is of no use."""
NEAR = 0.1
"""Distance from the models' predictions up to which a merge counts as near, in nats or shares of variance."""
WAYS = {
    "direct": "average them as is",
    "direct, repaired": "average them as is and re-estimate the normalisation statistics",
    "matched": "match their neurons, then average",
    "matched, repaired": "match their neurons, average, and re-estimate the normalisation statistics",
    "planned": "match the neurons where the plan says so, then average",
    "planned, repaired": "match the neurons where the plan says so, average, and re-estimate the statistics",
    "solved": "match their neurons, average, and solve the layers one by one",
}


@dataclass(frozen=True)
class Figure:
    """A measured network.

    Attributes:
        kind: "end", or the way of merging. best: whether it is the best merge.
    """

    name: str
    kind: str
    loss: float
    accuracy: float | None
    best: bool = False

    @property
    def shown(self) -> str:
        """The figure that people ask for first."""
        return percent(self.accuracy).replace(" ", "\u00a0") if self.accuracy is not None else nats(self.loss)

    @property
    def second(self) -> str:
        return f"loss {nats(self.loss)}" if self.accuracy is not None else "mean loss"


def nats(value: float) -> str:
    """A loss with its unit; breakdowns by name."""
    return f"{value:.3f}\u00a0nats" if math.isfinite(value) else "not finite"


def midpoint(curve: BarrierResult) -> int:
    """The grid point that is nearest to the average."""
    return min(range(len(curve.lambdas)), key=lambda i: abs(curve.lambdas[i] - 0.5))


def ends(report: Report) -> tuple[Figure, ...]:
    """Both models, as they are."""
    if not report.curves:
        return ()
    return _ends_of(next((c for c in report.curves if not c.repair), report.curves[0]))


def _restored(report: Report) -> tuple[Figure, ...]:
    """Both models with their BatchNorm statistics re-estimated on the inputs that the merges are made on."""
    curve = next((c for c in report.curves if c.repair), None)
    return () if curve is None else _ends_of(curve)


def _ends_of(curve: BarrierResult) -> tuple[Figure, ...]:
    return tuple(
        Figure(name, "end", curve.losses[i], None if curve.accuracies is None else curve.accuracies[i])
        for name, i in (("Model A", 0), ("Model B", -1))
    )


def merges(report: Report) -> tuple[Figure, ...]:
    """The merges with equal shares that were measured, the best one marked."""
    found = [
        Figure(c.label, c.label, c.losses[k], None if c.accuracies is None else c.accuracies[k])
        for c in report.curves
        if not (c.solved and report.solved)
        for k in (midpoint(c),)
    ] + [Figure(m.name, m.name, m.loss, m.accuracy) for m in report.solved]
    best = min((f for f in found if math.isfinite(f.loss)), key=lambda f: f.loss, default=None)
    return tuple(Figure(f.name, f.kind, f.loss, f.accuracy, best=f is best) for f in found)


def sentence(report: Report) -> tuple[str, str]:
    """The verdict ("yes", "care" or "no") and the sentence that says it."""
    two, found = ends(report), merges(report)
    best = next((f for f in found if f.best), None)
    if best is not None and len(two) == 2:
        return _measured(report, best, two)
    if report.merge is not None and report.merge.files:
        return _written(report.merge)
    if report.refused:
        return "no", f"These two models will not merge: {report.refused}."
    if report.prediction is not None and report.plan is None:
        advice = report.prediction.advice
        return ("yes" if advice.startswith("Merge") else "no" if advice.startswith("Do not") else "care"), advice
    if found:
        return "no", "Every merge of these two models breaks down: its loss is not finite."
    if report.plan is None:
        return "care", "There is no measurement and no plan."
    return {
        "direct": ("yes", "Merge these two models as is: no layer gains from permuting B's neurons."),
        "match": ("yes", "Put B's neurons into A's order first, then average the two models."),
    }.get(
        report.plan.verdict, ("no", "These two models will not merge: no order makes most of their neurons correspond.")
    )


def _written(merge: MergeResult) -> tuple[str, str]:
    way = {
        "match": "after putting B's neurons into A's order",
        "direct": "with their neurons as is",
        "transported": "after mapping B's neurons onto A's by optimal transport",
    }.get(merge.verdict, "although they do not correspond")
    if merge.repair is not None and fitted(merge.repair):
        way += f", then {merge.repair['layers']} layers of the average were refitted"
    looked = merge.comparison
    if looked is None or looked.get("distance") is None:
        return "care", f"The models were merged {way}; nothing was measured."
    unit = {"nats": " nats", "relative": " of the outputs' variance"}.get(looked["unit"], "")
    far = f"the result is {looked['distance']:.3f}{unit} away from their own predictions on the calibration inputs"
    return "yes" if looked["distance"] <= NEAR else "care", f"The models were merged {way}; {far}."


def fitted(repair: Mapping[str, Any]) -> bool:
    """Whether a repair computed weights from the calibration inputs, instead of scaling or shifting activations."""
    return str(repair["kind"]).startswith("solve") or repair["kind"] == "regmean"


def _measured(report: Report, best: Figure, two: tuple[Figure, ...]) -> tuple[str, str]:
    """A merge whose statistics fit the inputs looks good beside models whose own do not: those say nothing of it."""
    restored = _restored(report)
    gained = _loss(two) - _loss(restored) if restored else 0.0
    cost = best.loss - _loss(two)
    way = WAYS.get(best.kind, best.kind)
    have = f"the merged network {_has(best)}, the two models {_have(two)}"
    if gained > LARGE:
        what = "The inputs, or the models' BatchNorm statistics, seem to be off"
        return "care", f"{what}: {have}, and {_have(restored)} once these are re-estimated."
    if cost > LARGE and report.plan is None:  # of a barrier alone, which measures the ways that it was asked for
        return "care", f"Not in this way ({best.name}): {have}. Other ways were not measured."
    if cost > LARGE:
        return "no", f"Do not merge these two models: at best ({best.name}), {have}."
    if cost > SMALL:
        return "care", f"They merge at a price: {way}; {have}."
    return "yes", f"They merge well: {way}; {have}."


def _loss(two: tuple[Figure, ...]) -> float:
    return (two[0].loss + two[1].loss) / 2


def _has(one: Figure) -> str:
    return f"gets {one.shown}" if one.accuracy is not None else f"has a loss of {one.shown}"


def _have(two: tuple[Figure, ...]) -> str:
    word = "get" if two[0].accuracy is not None else "have"
    return f"{word} {two[0].shown} and {two[1].shown}"
