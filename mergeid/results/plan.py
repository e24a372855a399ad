"""What is to be done with a pair, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mergeid.evidence.decide import SpaceEvidence
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph

if TYPE_CHECKING:
    from torch import Tensor

    from mergeid.neuron_graph.turned import Turn
    from mergeid.repair.solve import SolvedLayer


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
        turns: orthogonal maps inside B's heads, after the permutations; matched_turns: after those of `matched`.
        solved: what solving would change, layer by layer, where that was asked for.
        fingerprints: of both models' weights (`mergeid.stages.saved_plan.fingerprint`).
        before: signs, orthogonal maps of residual streams and scales, before the permutations; after: scales, last.
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
    turns: Sequence[Turn] = ()
    matched_turns: Sequence[Turn] = ()
    before: Sequence[Turn] = ()
    after: Sequence[Turn] = ()
    solved: Sequence[SolvedLayer] = ()
    fingerprints: tuple[str, ...] = ()

    def __repr__(self) -> str:
        moved = sum(s.moved for s in self.spaces)
        what = f"spaces={len(self.spaces)}, moved={moved}, evidence={self.evidence!r}"
        return f"Plan({self.a!r}, {self.b!r}, verdict={self.verdict!r}, {what})"

    @property
    def moves(self) -> bool:
        """Whether anything of B is permuted, turned or scaled."""
        return bool(self.turns or self.before or self.after) or any(
            (p != range(len(p))).any() for p in self.element.values()
        )

    def plain(self) -> Plan:
        """The same with B as it lies."""
        return replace(self, element=self.graph.identity(), turns=(), before=(), after=())

    def full(self) -> Plan:
        """The same with every space matched."""
        return self if self.matched is None else replace(self, element=self.matched, turns=self.matched_turns)

    def over(self, graph: NeuronGraph) -> Plan:
        """The same for a graph with more tensors on the neurons: its other spaces follow those that hold them."""
        element: Element = {}
        for s in graph.spaces:  # parents come first
            element[s.id] = self.element[s.id] if s.id in self.element else graph.follow(s, element)
        return replace(self, graph=graph, element=element)

    def carry(self, tensor: str, value: Tensor) -> Tensor:
        """One tensor of B, by its key in the model's state dict, in A's order."""
        for turn in self.before:
            value = turn.apply(tensor, value)
        value = self.graph.apply(self.element, tensor, value)
        for turn in (*self.turns, *self.after):
            value = turn.apply(tensor, value)
        return value

    def carry_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """B's state dict in A's order."""
        return {name: self.carry(name, value) for name, value in state.items()}

    def carries_files(self, names: Mapping[str, str]) -> Callable[[str, Tensor], Tensor]:
        """`carry` under other names.

        Args:
            names: of the tensors in B's files -> keys of the model's state dict.
        """
        known = {key: name for name, key in names.items()}
        before, turns, after = (
            [turn.renamed(known) for turn in found] for found in (self.before, self.turns, self.after)
        )
        return replace(self, graph=self.graph.renamed(known), before=before, turns=turns, after=after).carry

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
            "turns": [turn.to_json() for turn in self.turns],
            "maps": [turn.as_map() for turn in self.before],
            "fingerprints": list(self.fingerprints),
            "solved": [layer.to_json() for layer in self.solved],
            "permutations": {k: p.tolist() for k, p in self.element.items() if (p != range(len(p))).any()},
            "graph": {
                "share": self.graph.share,
                "verified": self.graph.verified,
                "frozen": len(self.graph.frozen),
                "unknown_ops": self.graph.unknown_ops,
            },
        }
