"""Partners for one model, best first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mergeid.results.prediction import Outlook, PredictResult

FORMAT = "mergeid.ranking/1"


@dataclass(frozen=True)
class Partner:
    """Attributes:
    name: of the candidate. result: what is predicted of its merge with the model.
    """

    name: str
    result: PredictResult

    @property
    def way(self) -> Outlook:
        """The way that loses least, among those that can be told."""
        known = [o for o in self.result.outlooks if o.nats.trusted] or self.result.outlooks
        return min(known, key=lambda o: (o.nats.score, o.trouble))

    @property
    def label(self) -> str:
        """What the best way is called: of those that were tried, where any were."""
        return (self.result.best_trial or self.way).label

    @property
    def options(self) -> tuple[str, ...]:
        """Those of ``mergeid merge`` that merge in that way."""
        return (self.result.best_trial or self.way).options

    @property
    def tried(self) -> float | None:
        """Nats that the best of its merges lost in a trial; None without one."""
        best = self.result.best_trial
        return None if best is None else best.lost

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {"name": self.name, "way": self.way.label, "tried": self.tried, "prediction": self.result.to_json()}


@dataclass(frozen=True)
class Ranking:
    """Attributes:
    model: whose partners they are.
    partners: the best first, by the trials if there were any, else by prediction; what cannot be judged comes last.
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
        found = [Partner(name, result) for name, result in results]
        return cls(model, tolerated, sorted(found, key=_place), list(failed))

    @property
    def advice(self) -> str:
        """One sentence: whom to merge with."""
        best = self.partners[0]
        if not best.way.nats.trusted and best.tried is None:
            return (
                "Cannot tell: every candidate is unlike anything that the predictor was fitted on; measure them with "
                "mergeid barrier, or use --try."
            )
        lost = f"{best.way.nats.expected:.2g} nats of expected loss"
        if best.tried is not None:
            lost = f"{abs(best.tried):.2g} nats {'lost' if best.tried > 0 else 'gained'} in a trial"
        return f"Merge {self.model} (A) with {best.name} (B), {best.label}: {lost}."

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
    tried = partner.tried
    nats = partner.way.nats
    return tried is None and not nats.trusted, 0.0 if tried is None else tried, nats.score, partner.name
