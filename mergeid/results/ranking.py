"""Partners for one model, best first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mergeid.prediction.opinions import behind
from mergeid.results.prediction import SAYS_ONE_THING, Outlook, PredictResult, cannot_tell, in_nats
from mergeid.results.trial import Trial

FORMAT = "mergeid.ranking/1"


@dataclass(frozen=True)
class Partner:
    """Attributes:
    name: of the candidate. result: what is predicted of its merge with the model.
    behind: nats of loss that it has itself beyond the model, on the model's own inputs, by what the model and its
        candidates say of them; None where nothing is known of it.
    """

    name: str
    result: PredictResult
    behind: float | None = None

    @property
    def way(self) -> Outlook:
        """The way that loses least, among those that can be told."""
        known = [o for o in self.result.outlooks if o.nats.trusted] or self.result.outlooks
        return min(known, key=lambda o: (o.change, o.trouble, o.nats.score))

    @property
    def same(self) -> bool:
        """Whether it computes the same as the model, perhaps with its neurons in another order."""
        return any(o.nats.score == -math.inf for o in self.result.outlooks)

    @property
    def told(self) -> bool:
        """Whether something is known of its merge: by a trial, else by what is predicted."""
        return self.way.nats.trusted if self.trial is None else not self.trial.says_nothing

    @property
    def trial(self) -> Trial | None:
        """The merge that did best of those that were made in memory and run; None where none were."""
        return min(self.result.trials, key=lambda t: t.against_a, default=None)

    @property
    def beyond(self) -> float | None:
        """Nats of loss that the merge has beyond the model alone, on the model's own inputs; negative where it has
        less. Expected: the mean of both models' losses lies half of `behind` above the model's, and the merge's lies
        `Outlook.change` above the mean. Measured, where there was a trial. None where `behind` is."""
        if self.trial is not None:
            return self.trial.against_a
        return None if self.behind is None else self.behind / 2 + self.way.change

    @property
    def label(self) -> str:
        """What the best way is called: of those that were tried, where any were."""
        return (self.trial or self.way).label

    @property
    def options(self) -> tuple[str, ...]:
        """Those of ``mergeid merge`` that merge in that way."""
        return (self.trial or self.way).options

    @property
    def tried(self) -> float | None:
        """Nats that the best of its merges lost in a trial against the mean of both models; None without one."""
        return None if self.trial is None else self.trial.lost

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "name": self.name,
            "way": self.way.label,
            "tried": self.tried,
            "behind": self.behind,
            "beyond": self.beyond,
            "prediction": self.result.to_json(),
        }


@dataclass(frozen=True)
class Ranking:
    """Attributes:
    model: whose partners they are.
    partners: the best first, by the loss that the merged network is expected to have (`Partner.beyond`): a merge that
        loses little against the mean of two models is bad where one of them is. What cannot be judged comes last.
    failed: candidates that cannot be merged with it, and why.
    """

    model: str
    tolerated: float
    partners: list[Partner]
    failed: list[tuple[str, str]]

    @classmethod
    def of(
        cls,
        model: str,
        tolerated: float,
        results: Sequence[tuple[str, PredictResult]],
        failed: Sequence[tuple[str, str]] = (),
    ) -> Ranking:
        """The partners, best first."""
        heard = [r.opinions for _, r in results if r.opinions is not None]
        known = behind(heard) if len(heard) == len(results) else None
        each = [r.behind for _, r in results] if known is None else [*known]
        found = [Partner(name, result, own) for (name, result), own in zip(results, each, strict=True)]
        return cls(model, tolerated, sorted(found, key=_place), list(failed))

    @property
    def best(self) -> Partner:
        """The first that does not compute the same as the model."""
        return next((p for p in self.partners if not p.same), self.partners[0])

    @property
    def gains_nothing(self) -> bool:
        """Whether even the best merge loses more than is tolerated against the model alone, or is the model."""
        lost = self.best.beyond
        return self.best.same or (lost is not None and lost > self.tolerated)

    @property
    def advice(self) -> str:
        """Whom to merge with, and who computes the same as the model."""
        same = [p.name for p in self.partners if p.same]
        if len(same) == len(self.partners):
            whom = f"{same[0]} (B) computes" if len(same) == 1 else "all candidates compute"
            return f"Nothing is gained by a merge: {whom} the same as {self.model} (A)."
        if not same:
            return self._advice
        verb = "computes" if len(same) == 1 else "compute"
        return f"{self._advice} {', '.join(same)} {verb} the same as {self.model} (A)."

    @property
    def _advice(self) -> str:
        best = self.best
        if not best.told:
            if best.trial is not None:
                return cannot_tell(SAYS_ONE_THING.format(kind="input"))
            return (
                "Cannot tell: every candidate is unlike anything that the predictor was fitted on; measure them with "
                "mergeid barrier, or use --try."
            )
        lost, how = best.beyond, "expected" if best.tried is None else "in a trial"
        pair = f"{self.model} (A) with {best.name} (B), {best.label}"
        if lost is None:
            return f"Merge {pair}: {in_nats(best.way.nats.expected)} nats lost (expected)."
        if self.gains_nothing:
            return (
                f"Nothing is gained: even the best merge, {pair}, loses {in_nats(lost)} nats against A alone ({how})."
            )
        return f"Merge {pair}: {in_nats(abs(lost))} nats {'lost' if lost > 0 else 'gained'} against A alone ({how})."

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "format": FORMAT,
            "model": self.model,
            "tolerated": self.tolerated,
            "partners": [p.to_json() for p in self.partners],
            "failed": [{"name": name, "why": why} for name, why in self.failed],
            "advice": self.advice,
        }


def _place(partner: Partner) -> tuple[bool, float, float, str]:
    nats, beyond = partner.way.nats, partner.beyond
    return not partner.told, 0.0 if beyond is None else beyond, nats.score, partner.name
