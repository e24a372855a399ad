"""Which of the merges at hand is nearest to the models, and how near."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

from mergeid.results.agreement import Agreement

NATS, RELATIVE = "nats", "relative"
"""Units of a distance: the excess of a classifying head, the share of the variance of any other output."""
PLAIN, MIXED, MATCHED = "plain", "mixed", "matched"
"""The merges: nothing moved, some spaces matched, every space matched."""


@dataclass(frozen=True)
class Distance:
    """How far a merge is from the models by one output: nats of excess, or share of the output's variance."""

    value: float
    unit: str

    def __str__(self) -> str:
        if self.unit == NATS:
            return f"{shown(self.value)} nats from the models' own predictions"
        return f"off the models' outputs by {shown(self.value)} of their variance"


@dataclass(frozen=True)
class Comparison:
    """Attributes:
    distances: merge ("plain", "matched+bn", …) -> how far it is from the models, mean over the outputs.
    planned: the merge that the plan chose; chosen: the one to write.
    repair: of the one to write, "none", "bn", "repair", "regmean", "solve" or "solve+lean".
    outputs: output -> how far the one to write is by it alone.
    examples: how many were compared.
    error: standard error of the difference between the distances of the planned merge (under its own best repair) and
        of the chosen one; None where they are one merge, or it is not known.
    unlike: how the models agree, where that says that the inputs are of another kind than the training's: then merges
        are solved only so that they lean to one model.
    apart: nats that the models differ by from their mean, where they come from one start and are sure of different
        answers: then no merge is solved.
    unasked: what the same merge is called without the repair that was asked for, where that is nearer by more than
        chance.
    """

    distances: dict[str, float]
    planned: str
    chosen: str
    repair: str
    outputs: dict[str, Distance]
    examples: int
    error: float | None = None
    unlike: Agreement | None = None
    apart: float | None = None
    unasked: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The attributes, the `worst` output's distance, and the unit of all. What is not finite, which JSON has no
        number for, is None."""

        def known(value: float) -> float | None:
            return value if isfinite(value) else None

        return {
            "planned": self.planned,
            "chosen": self.chosen,
            "repair": self.repair,
            "distance": known(self.worst.value),
            "unit": self.unit,
            "distances": {k: known(v) for k, v in self.distances.items()},
            "outputs": {k: {"distance": known(d.value), "unit": d.unit} for k, d in self.outputs.items()},
            "examples": self.examples,
            "error": self.error,
            "unlike": None if self.unlike is None else self.unlike.to_json(),
            "apart": self.apart,
            "unasked": self.unasked,
        }

    @property
    def about_inputs(self) -> str | None:
        """What the user is told where the models' answers to the calibration inputs decide what is solved."""
        if self.unlike is not None:
            return self.unlike.note(self.repair.endswith("+lean"))
        if self.apart is None:
            return None
        return (
            f"no merge was solved: on the calibration inputs the models are sure of different answers (they differ by "
            f"{self.apart:.2f} nats from their mean), and the mean of those is often less right than the average of "
            f"the weights. For models of different tasks, give separate data for each (--data a=…,b=…); --repair solve "
            f"solves anyway"
        )

    @property
    def label(self) -> str:
        """The merge to write with its repair, as in `distances`."""
        return label(self.chosen, self.repair)

    @property
    def unit(self) -> str:
        """ "nats", "relative", or "both" where there are outputs of either kind."""
        units = {d.unit for d in self.outputs.values()}
        return units.pop() if len(units) == 1 else "both"

    @property
    def worst(self) -> Distance:
        """The merge to write, by the output that it is farthest by."""
        return max(self.outputs.values(), key=lambda d: d.value)

    def refused(self, above: float) -> str | None:
        """Why the nearest merge should not be written; None where it is near enough."""
        if self.worst.value <= above:
            return None
        name = next(n for n, d in self.outputs.items() if d is self.worst)
        by = f" by its output {name!r}" if len(self.outputs) > 1 else ""
        what, nearer = "even the nearest merge", ""
        if self.unasked is not None:
            what = "the merge with the repair asked for"
            nearer = f", and {shown(self.distances[self.unasked])} without it ({self.unasked})"
        return (
            f"{what} ({self.label}) is{by} {self.worst}, on {self.examples} "
            f"calibration examples{nearer}; --refuse-above is {above:g}"
        )

    @property
    def about_repair(self) -> str | None:
        """What the user is told where the repair that was asked for does harm."""
        if self.unasked is None:
            return None
        own, other = (shown(self.distances[key]) for key in (self.label, self.unasked))
        return (
            f"the repair does harm: on calibration examples that it was not fitted to, {self.label} is farther from "
            f"the models than {self.unasked} ({own} to {other}). It was made as asked; --repair auto takes the nearest"
        )

    @property
    def note(self) -> str | None:
        """What the user is told where the plan is not followed."""
        if self.chosen == self.planned:
            return None
        what = {NATS: "nats of excess", RELATIVE: "of the outputs' variance"}.get(self.unit, "on the outputs' mean")
        own = min((v for k, v in self.distances.items() if k.split("+")[0] == self.planned), default=inf)
        other = self.distances[self.label]
        if self.error is not None:
            what += f", a difference of {abs(own - other):.2g} with a standard error of {self.error:.2g}"
        if self.chosen == PLAIN:
            said = f"matching was not used: on {self.examples} calibration examples the matched merge is farther from "
            return f"{said}the models than the plain one ({shown(own)} to {shown(other)} {what})"
        said = f"every space was matched: on {self.examples} calibration examples that merge is nearer to the models "
        return f"{said}than the planned one ({shown(other)} to {shown(own)} {what})"


def label(merge: str, repair: str) -> str:
    """``"matched"``, ``"matched+bn"``."""
    return merge if repair == "none" else f"{merge}+{repair}"


def shown(distance: float) -> str:
    """With the decimals that `TIE` tells apart."""
    distance = round(distance, 3) + 0.0 if abs(distance) < 1 else distance  # no -0.000
    return (
        f"{distance:.3f}" if abs(distance) < 1e4 else f"{distance:,.0f}" if abs(distance) < 1e9 else f"{distance:.3g}"
    )
