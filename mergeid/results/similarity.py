"""How alike two models are, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class LayerSimilarity:
    """The indices of one pair of layers (`mergeid.evidence.similarity.PairSums`).

    Attributes:
        layer: its name in both models.
        neurons: how many it has in A and in B.
        rows: positions of examples that were looked at.
    """

    layer: str
    neurons: tuple[int, int]
    rows: int
    cka: float
    cka_unbiased: float
    svcca: float
    pwcca: float


@dataclass(frozen=True)
class SimilarityResult:
    """How alike two models are, layer by layer.

    Attributes:
        layers: the layers that both models have under one name, in forward order.
        names_a, names_b: rows and columns of `cka_map`.
        cka_map: unbiased CKA of every layer of A with every layer of B, on position-averaged activations; float64.
    """

    a: str
    b: str
    examples: int
    layers: list[LayerSimilarity]
    names_a: list[str]
    names_b: list[str]
    cka_map: np.ndarray = field(repr=False)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "format": "mergeid.similarity/1",
            "a": self.a,
            "b": self.b,
            "examples": self.examples,
            "layers": [asdict(layer) for layer in self.layers],
            "map": {"a": self.names_a, "b": self.names_b, "cka_unbiased": self.cka_map.tolist()},
            "notes": self.notes,
        }
