"""What a fine-tune adds to its base, written as an adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class ExtractResult:
    """Attributes:
    files: what was written.
    rank: of the factors; less where a tensor allows less.
    errors: tensor name -> ‖Δ − s B A‖ / ‖Δ‖ of what was truncated.
    error: the same of all truncated tensors together.
    whole: changed tensors that are no weights of linear layers, and lie in the adapter as they are.
    """

    rank: int
    files: list[Path] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    error: float = 0.0
    whole: list[str] = field(default_factory=list)

    @property
    def left_out(self) -> str:
        """`error` in percent, with its sign."""
        return f"{100 * self.error:.2g} %" if self.error >= 1e-4 else "less than 0.01 %"

    def to_json(self) -> dict[str, Any]:
        """Everything."""
        return {**self.__dict__, "files": [str(f) for f in self.files]}
