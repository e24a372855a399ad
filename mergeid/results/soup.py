"""What a soup is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ingredient:
    """One model of a soup.

    Attributes:
        source: as the user named it.
        loss, accuracy: of it alone, on the validation data; None where that was not measured, or has no meaning.
        kept: whether it is in the soup.
        coefficient: mean of what its tensors are weighted with.
    """

    source: str
    loss: float | None
    accuracy: float | None
    kept: bool
    coefficient: float


@dataclass(frozen=True)
class SoupResult:
    """What a soup is made of, and how good it is.

    Attributes:
        how: "uniform", "greedy" or "adamerging".
        ingredients: in the order given.
        loss, accuracy: of the soup, on the data that it was chosen on; None where there are no labels.
        entropy: mean entropy of its predictions in nats, before and after coefficients were learned; None where none
            were.
        examples: number of examples.
        files: what was written.
        state: the soup's state dict, for live modules.
        notes: what the user should know.
        report: what happened to the tensors, as JSON.
    """

    how: str
    ingredients: tuple[Ingredient, ...]
    loss: float | None
    accuracy: float | None
    entropy: tuple[float, float] | None
    examples: int
    files: list[Path] = field(default_factory=list)
    state: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    report: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything but the weights."""
        return {
            "how": self.how,
            "ingredients": [dict(i.__dict__) for i in self.ingredients],
            "loss": self.loss,
            "accuracy": self.accuracy,
            "entropy": None if self.entropy is None else list(self.entropy),
            "examples": self.examples,
            "files": [str(f) for f in self.files],
            "notes": self.notes,
            "report": self.report,
        }
