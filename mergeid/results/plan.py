"""What is to be done with a pair, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mergeid.evidence.decide import SpaceEvidence
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph


@dataclass(frozen=True)
class Plan:
    """What to do with a pair, and why.

    Attributes:
        verdict: "direct", "match" or "will not merge".
        spaces: one record per space of the graph.
        element: permutations of B, space id -> int array; the identity where the decision is direct.
        notes: what the user should know besides.
        evidence: "activations", "weights" or "structure" (all spaces identified, without data).
        structure: what was computed of the structural margins (on the spaces' records), or why nothing was.
        matched: permutations of B with every space matched, where activations were compared.
    """

    a: str
    b: str
    arch: str
    match: str
    verdict: str
    spaces: list[SpaceEvidence]
    notes: list[str]
    graph: NeuronGraph
    element: Element
    evidence: str
    examples: int
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    structure: dict[str, Any] = field(default_factory=dict)
    matched: Element | None = None

    @property
    def moves(self) -> bool:
        """Whether anything of B is permuted."""
        return any((p != range(len(p))).any() for p in self.element.values())

    def to_json(self) -> dict[str, Any]:
        """Everything but the activations; permutations as lists."""
        return {
            "format": "mergeid.plan/1",
            "a": self.a,
            "b": self.b,
            "arch": self.arch,
            "match": self.match,
            "verdict": self.verdict,
            "evidence": self.evidence,
            "examples": self.examples,
            "seed": self.seed,
            "settings": self.settings,
            "notes": self.notes,
            "structure": self.structure,
            "spaces": [s.to_json() for s in self.spaces],
            "permutations": {k: p.tolist() for k, p in self.element.items() if (p != range(len(p))).any()},
            "graph": {
                "share": self.graph.share,
                "verified": self.graph.verified,
                "frozen": len(self.graph.frozen),
                "unknown_ops": self.graph.unknown_ops,
            },
        }
