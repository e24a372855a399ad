"""The plan of a merge: per space the decision with its evidence, and the group element that aligns B to A."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from mergeid.combine.asymmetric import compared
from mergeid.errors import MergeidError
from mergeid.evaluate.batches import FixedBatches, input_dtype, is_whole, to_model
from mergeid.evidence.activations import PairStream, TapReader, choose_taps
from mergeid.evidence.decide import (
    DIRECT,
    MATCH,
    WILL_NOT,
    SpaceEvidence,
    decide_from_activations,
    decide_from_structure,
    decide_from_weights,
)
from mergeid.evidence.evidence import ActivationEvidence
from mergeid.io.memory import give_back
from mergeid.matchers.activation import WEIGHT_SHARE, combined_matching
from mergeid.matchers.inner_products import WeightSimilarity
from mergeid.matchers.protocol import Matcher, MatchTask, Training, check_matcher, get_matcher
from mergeid.models.load import Loaded, graph_of
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph
from mergeid.nn.folding import effective_state
from mergeid.stages.structure import Batches, certified, contradictions, structure_of, why_not, without_data

Progress = Callable[[str, int, int], None]
Hears = Callable[[Any, Any, dict[str, Any]], None]
"""Outputs of A and of B, and the batch that they are of."""
MODES = ("auto", "never", "always")
LEAST = 16
"""Calibration examples that evidence needs."""


@dataclass
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


def make_plan(
    a: Loaded,
    b: Loaded,
    *,
    dataset: Any = None,
    match: str = "auto",
    seed: int = 0,
    batch_size: int = 32,
    collate: Callable[[Any], Any] | None = None,
    graph: NeuronGraph | None = None,
    structure: bool = True,
    base: Mapping[str, torch.Tensor] | None = None,
    certify: bool = False,
    matcher: str | None = None,
    matched: Element | None = None,
    hears: Hears | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Decide for every space of the pair.

    Args:
        a, b: loaded models of one architecture.
        dataset: map-style calibration data; None: only the weights speak.
        match: "auto" decides per space, "always" matches every space, "never" none.
        batch_size: for speed and memory only.
        graph: skip tracing (must be this architecture's).
        structure: attach structural margins where both models share a fixed part; they change no decision. Without
            data the structure decides all spaces if it identifies every one, whatever this says.
        base: state dict, under the model's keys, of what both were fine-tuned from.
        certify: with radii of stability.
        matcher: name in the registry (`mergeid.matchers.protocol`); None: combined with data, weight without.
        matched: the match of that matcher, where it was found already (`mergeid.matchers.cycle`).
        hears: takes both models' outputs on every calibration batch that is run, as they are. With "always" these are
            of every other example, once; with "auto" of all, and of those that decisions are judged on again.

    Raises `MergeidError` for too few calibration examples, an unknown `match` or `matcher`, and where the matcher
    cannot do without data.
    """
    if match not in MODES:
        raise MergeidError(f"--match {match!r} is not one of {', '.join(MODES)}")
    named = check_matcher(matcher, match, dataset is not None)
    tell = progress or (lambda *_: None)
    if graph is None:
        tell("tracing and verifying the neuron graph", 0, 1)
        graph = graph_of(a, seed=seed)
    notes = _graph_notes(graph) + compared(a.state(), b.state())
    generator = torch.Generator().manual_seed(seed)
    count = 0 if dataset is None else len(dataset)
    if dataset is not None and count < LEAST:
        raise MergeidError(f"--data holds {count} examples; the evidence needs at least {LEAST}")
    records: list[SpaceEvidence]
    said: dict[str, Any] = {"computed": False, "why": why_not(a.state(), base, match)}
    speaks = "weights" if dataset is None else "activations"
    settings: dict[str, Any] = {"batch_size": batch_size, "weight_share": WEIGHT_SHARE}
    if matcher is not None:
        settings["matcher"] = matcher
    if match == "never":
        element, records = graph.identity(), []
    elif dataset is None:
        if match == "always":
            tell("matching", 0, 1)
            task = MatchTask(graph, a.state(), b.state(), generator)
            element, records = matched or (named or get_matcher("weight")).match(task), []
        else:
            known = {}
            if said["why"] is None:
                tell("structure", 0, 1)
                known = certified(graph, a, b, base)
                said, more = without_data(known, certify)
                notes += more
            decided = decide_from_structure(graph, known) if known else None
            if decided is not None:
                speaks = "structure"
            else:
                tell("weight matching", 0, 1)
                decided = decide_from_weights(WeightSimilarity(graph, a.state(), b.state()), generator=generator)
            element = decided.element
            records = [replace(r, certificate=known.get(r.id)) for r in decided.spaces]
    else:
        batches = batches_of(a, dataset, collate, batch_size, tell)
        evidence = evidence_of(graph, a, b, batches, seed, judged=match == "auto", whole=is_whole(dataset), hears=hears)
        tell("matching", 0, 1)
        correlation = evidence.correlations()
        give_back()  # the sums that they come from
        similarity = WeightSimilarity(graph, a.state(), b.state())
        if named is None or named.name == "combined":
            matched = combined_matching(similarity, correlation, generator=generator)
        elif matched is None:
            matched = _matched(named, graph, a, b, generator, correlation, dataset, collate, batch_size)
        if match == "always":
            element, records = matched, []
        else:
            # float32: of wide layers these are large
            cosines = {s.id: np.float32(WEIGHT_SHARE * similarity.cosines(s, matched)) for s in graph.spaces}
            scores = {k: c + correlation.pop(k, np.float32(0)) for k, c in cosines.items()}
            if named is not None and named.name != "combined":
                # the candidate is the matcher's own pairing wherever the parents' decisions leave it possible
                scores = {k: np.eye(len(p))[p] for k, p in matched.items()}
            give_back()  # the scores of all passes
            tell("judging on held-out examples", 0, 1)
            decided = decide_from_activations(evidence, scores, cosines, matched, seed=seed)
            element = decided.element
            effective = effective_state(a.state()), effective_state(b.state())
            records = _with_chords(graph, evidence, decided.spaces, element, matched, *effective)
    if structure and dataset is not None and said["why"] is None:
        tell("structure", 0, 1)
        batches = batches_of(a, dataset, collate, batch_size, tell)
        found = structure_of(graph, a, b, element, batches, base=base, certify=certify, seed=seed)
        records = [replace(r, structure=found.records.get(r.id), certificate=found.certificates[r.id]) for r in records]
        said = found.said
        notes += found.notes + contradictions(records, said["orders"])
    elif base is not None and not said["computed"]:
        notes.append(f"the base was not used: {said['why']}")
    if speaks == "weights":
        notes.append(
            "no calibration data: only the weights speak, which is weaker evidence, and nothing is promised; "
            "give --data for activations"
        )
    verdict = _verdict(match, records, notes)
    return Plan(
        a.source,
        b.source,
        a.arch.id,
        match,
        verdict,
        records,
        notes,
        graph,
        element,
        speaks,
        count,
        seed,
        settings,
        said,
        matched if dataset is not None else None,
    )


def _matched(
    matcher: Matcher,
    graph: NeuronGraph,
    a: Loaded,
    b: Loaded,
    generator: torch.Generator,
    correlation: Mapping[str, np.ndarray],
    dataset: Any,
    collate: Callable[[Any], Any] | None,
    batch_size: int,
) -> Element:
    """The match of a named matcher, with everything that the data can tell it."""

    def loss(output: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor | None:
        parts = a.adapter.loss(a.arch, output, dict(batch)) if "labels" in batch else None
        return None if parts is None else parts.loss.sum() / parts.count.sum().clamp(min=1)

    def batches() -> Iterator[dict[str, Any]]:
        return (
            to_model(batch, next(a.model.parameters()).device, input_dtype(a.model))
            for batch in FixedBatches(dataset, batch_size, collate)
        )

    training = Training(a.model, a.forward, loss, batches)
    return matcher.match(MatchTask(graph, a.state(), b.state(), generator, correlation, training))


def batches_of(
    a: Loaded, dataset: Any, collate: Callable[[Any], Any] | None, batch_size: int, tell: Progress
) -> Batches:
    """Starts a pass over the calibration data, without labels, on A's device."""
    if is_whole(dataset):
        batch_size, collate = 1, lambda items: items[0]
    device = next((p.device for p in a.model.parameters()), torch.device("cpu"))

    def batches() -> Iterator[dict[str, Any]]:
        for start in range(0, len(dataset), batch_size):
            items = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
            batch = collate(items) if collate else torch.utils.data.default_collate(items)
            tell("calibration", start, len(dataset))
            yield to_model(a.inputs_of(batch), device, None)

    return batches


def evidence_of(
    graph: NeuronGraph,
    a: Loaded,
    b: Loaded,
    batches: Batches,
    seed: int,
    *,
    judged: bool = True,
    whole: bool = False,
    hears: Hears | None = None,
) -> ActivationEvidence:
    """Activations of both models, collected in one pass; `judged`: of the half too that decisions are judged on;
    `whole`: every batch is one input, whose tensors need not have a common first dimension."""
    taps = choose_taps(graph, a.model)
    flat = [t for list_of in taps.values() for t in list_of]
    forward_a, forward_b = a.forward, b.forward
    if hears is not None:
        kept: list[Any] = []

        def forward_a(model: torch.nn.Module, batch: Any) -> Any:
            kept[:] = [a.forward(model, batch)]
            return kept[0]

        def forward_b(model: torch.nn.Module, batch: Any) -> Any:
            out = b.forward(model, batch)
            hears(kept.pop(), out, batch)
            return out

    stream = PairStream(
        TapReader(a.model, forward_a, flat), TapReader(b.model, forward_b, flat), batches, whole=whole, seed=seed
    )
    evidence = ActivationEvidence(graph, stream, taps)
    evidence.collect(judged=judged)
    return evidence


def _with_chords(
    graph: NeuronGraph,
    evidence: ActivationEvidence,
    records: list[SpaceEvidence],
    element: Element,
    matched: Element,
    a: Mapping[str, torch.Tensor],
    b: Mapping[str, torch.Tensor],
) -> list[SpaceEvidence]:
    """The records with the chord deviation under the identity and under the match."""
    out = []
    for space, record in zip(graph.spaces, records, strict=True):
        direct = {**element, space.id: graph.follow(space, element)}
        # a match fitted under other parents than the decided ones is no candidate
        best = matched if record.decision != MATCH and not space.parents else element
        chords = [evidence.chord(space.id, e, a, b) for e in (direct, {**element, space.id: best[space.id]})]
        out.append(replace(record, chord_identity=chords[0], chord_match=chords[1]))
    return out


def _graph_notes(graph: NeuronGraph) -> list[str]:
    notes = []
    if graph.unknown_ops:
        ops = ", ".join(f"{op} (at {where or 'the top'})" for op, where in graph.unknown_ops.items())
        notes.append(f"operations without a rule froze what they touch: {ops}")
    if not graph.spaces:
        notes.append("no axis of this model can be permuted: it can only be merged as it is")
    return notes


def _verdict(match: str, records: list[SpaceEvidence], notes: list[str]) -> str:
    if match == "never":
        return DIRECT
    if match == "always":
        return MATCH
    lost = [r for r in records if r.decision == WILL_NOT]
    share = sum(r.share for r in lost) / max(sum(r.share for r in records), 1e-12)
    if lost:
        notes.append(
            f"{len(lost)} of {len(records)} spaces ({share:.0%} of the weights on them) do not correspond under any "
            "assignment"
        )
    if share > 0.5:
        return WILL_NOT
    return MATCH if any(r.decision == MATCH for r in records) else DIRECT
