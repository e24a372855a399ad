"""What merges said that were made in memory and run: trials, beside predictions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mergeid.prediction.model import Interval
from mergeid.results.comparison import PLAIN

REPAIRS = {"none": "", "bn": ", repaired", "repair": ", rescaled", "regmean": ", RegMean"}
SOLVED = {"solve": "solved", "solve+lean": "solved, leaning"}


@dataclass(frozen=True)
class Labelled:
    """By true labels.

    Attributes:
        nats: loss beyond the mean of the models'; low, high: of its 90 % interval, by the spread over the examples.
        corrected, corrected_low, corrected_high: the same with what was predicted taken into account.
        points: accuracy lost; None where the task has none.
        examples: how many had labels.
        behind: nats of loss that B itself has beyond A.
    """

    nats: float
    low: float
    high: float
    corrected: float
    corrected_low: float
    corrected_high: float
    points: float | None
    examples: int
    behind: float = 0.0


@dataclass(frozen=True)
class Trial:
    """One merge that was made and run on calibration inputs.

    Attributes:
        merge: "plain" or "matched"; repair: "none", "bn", "regmean", "solve" or "solve+lean", made on other inputs than
            it was run on.
        hard, soft: nats lost beyond the mean of the models', where the most probable class of what they say together
            is taken for the truth, or their mean prediction itself; negative where the merge is nearer to it than they.
        missed: share of these classes that the merge names less often than the models do.
        examples: inputs that it was run on.
        labelled: the same by true labels; None without.
        beyond: nats lost beyond A alone, where A's predictions, made surer, take the place of labels.
        sharp: as `soft`, by their mean prediction made surer.
        nats: the loss beyond the mean of the models' that is expected of the merge on other inputs, by the trial and by
            what was predicted of it before; negative where it is less. None for a merge that nothing was fitted on.
    """

    merge: str
    repair: str
    hard: float
    soft: float
    missed: float
    examples: int
    labelled: Labelled | None = None
    beyond: float = 0.0
    sharp: float = 0.0
    nats: Interval | None = None

    @property
    def label(self) -> str:
        """As the prediction of that way is called."""
        if self.repair in SOLVED:
            return SOLVED[self.repair]
        return ("direct" if self.merge == PLAIN else "matched") + REPAIRS[self.repair]

    @property
    def fitted_way(self) -> str | None:
        """The way of `mergeid.prediction.model.WAYS` that it is one of; None for one that nothing was fitted on."""
        if self.repair == "none":
            return "direct" if self.merge == PLAIN else "matched"
        return {"bn": "repaired", "solve": "solved", "solve+lean": "leaning"}.get(self.repair)

    @property
    def trusted(self) -> Interval | None:
        """`nats`, where they are to be trusted."""
        return self.nats if self.nats is not None and self.nats.trusted else None

    @property
    def says_nothing(self) -> bool:
        """Whether a model makes one prediction for all inputs, so that what was lost of it tells nothing; labels do."""
        return self.labelled is None and self.nats is not None and self.nats.collapsed

    @property
    def lost(self) -> float:
        """Nats that it lost: by labels and prediction together, where there are labels."""
        return self.soft if self.labelled is None else self.labelled.corrected

    @property
    def expected(self) -> float | None:
        """Nats that it is expected to lose on other inputs, by labels, else by the trial; None where nothing tells."""
        if self.labelled is not None:
            return self.labelled.corrected
        return None if self.trusted is None else self.trusted.expected

    @property
    def against_a(self) -> float:
        """Nats that it lost beyond A alone: by labels and prediction together, where there are labels."""
        known = self.labelled
        return self.beyond if known is None else known.corrected + known.behind / 2

    @property
    def options(self) -> tuple[str, ...]:
        """Those of ``mergeid merge`` that merge in this way."""
        matched = () if self.repair in SOLVED else ("--match", "never" if self.merge == PLAIN else "always")
        return *matched, "--repair", self.repair

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {"way": self.label, **asdict(self), "nats": None if self.nats is None else self.nats.to_json()}
