"""What a merge, an alignment or a scramble did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergeid.results.plan import Plan


@dataclass(frozen=True)
class MergeResult:
    """What a merge (or an alignment) did.

    Attributes:
        verdict: "direct", "match" or "will not merge"; "transported" after optimal transport.
        files: what was written, weights first.
        plans: the decisions for every further model and, last, the base, each against the first; none for a plain
            merge.
        notes: what the user should know.
        repaired: tensors that were repaired after the merge.
        state: the merged state dict, for live modules; what is no tensor in it (`get_extra_state`) is the first one's.
        report: what happened to the tensors, as JSON.
        repair: what the repair stage did, with the spread of activations before and after; None where there was none.
        in_place: per further model, how many of its rows are nearest to the same row of the first model
            (`mergeid.combine.in_place`), if that decided what was planned; else None.
        comparison: how far the candidate merges are from the models on calibration inputs, and which one was chosen
            (`mergeid.stages.compare`); None without data.
    """

    verdict: str
    files: list[Path] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    state: dict[str, Any] | None = None
    report: Mapping[str, Any] = field(default_factory=dict)
    repair: Mapping[str, Any] | None = None
    comparison: Mapping[str, Any] | None = None
    in_place: Mapping[str, Any] | None = None

    def __repr__(self) -> str:
        where = f"files={[str(f) for f in self.files]}" if self.state is None else f"state={len(self.state)} tensors"
        chosen = f", chosen={self.comparison['chosen']!r}" if self.comparison else ""
        return f"MergeResult(verdict={self.verdict!r}, {where}{chosen})"

    @property
    def plan(self) -> Plan | None:
        """The decisions for the second model; None for a plain merge."""
        return self.plans[0] if self.plans else None

    def to_json(self) -> dict[str, Any]:
        """Everything but the weights."""
        return {
            "verdict": self.verdict,
            "files": [str(f) for f in self.files],
            "notes": self.notes,
            "repaired": self.repaired,
            "repair": self.repair,
            "comparison": self.comparison,
            "in_place": self.in_place,
            "report": self.report,
            "plan": self.plan.to_json() if self.plan else None,
            "further_plans": [plan.to_json() for plan in self.plans[1:]],
        }


@dataclass(frozen=True)
class ScrambleResult:
    """Attributes:
    moved_share: share of the parameters whose tensor has moved.
    max_relative_error: largest output change in float64 over the largest output.
    """

    files: list[Path]
    arch: str
    seed: int
    moved_share: float
    max_relative_error: float
    spaces: int

    def to_json(self) -> dict[str, Any]:
        """Everything."""
        return {**self.__dict__, "files": [str(f) for f in self.files]}
