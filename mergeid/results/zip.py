"""What zipping two models made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ZipResult:
    """Two models with one trunk.

    Attributes:
        states: A's and B's state dicts, equal on the trunk; one alone with ``one_head``.
        trunk: state-dict keys that both share.
        share: parameters of the trunk / parameters of A.
        within: label of each zipped space -> share of its features that were merged inside one model.
        apart: labels of the spaces that were not zipped.
        repaired: state-dict keys whose BatchNorm statistics were estimated again.
        files: what was written.
        notes: what the user should know.
    """

    states: tuple[dict[str, Tensor], ...]
    trunk: tuple[str, ...]
    share: float
    within: Mapping[str, float]
    apart: list[str]
    repaired: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Everything but the weights."""
        return {
            "heads": len(self.states),
            "trunk": list(self.trunk),
            "share": self.share,
            "within": dict(self.within),
            "apart": self.apart,
            "repaired": self.repaired,
            "files": [str(f) for f in self.files],
            "notes": self.notes,
        }
