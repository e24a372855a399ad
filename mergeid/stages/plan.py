"""Plan: what to do with a pair, space by space, from activations, weights or structure."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from mergeid.basics.memory import give_back
from mergeid.basics.when_asked import Stored, WhenAsked
from mergeid.combine.asymmetric import compared
from mergeid.data.batches import input_dtype, to_model
from mergeid.evidence.decide import (
    DIRECT,
    MATCH,
    WILL_NOT,
    Decisions,
    SpaceEvidence,
    decide_from_activations,
    decide_from_structure,
)
from mergeid.evidence.decide_weights import decide_from_weights, decided_copy
from mergeid.evidence.evidence import ActivationEvidence
from mergeid.io.opening import Source
from mergeid.matchers.activation import WEIGHT_SHARE, combined_matching
from mergeid.matchers.copies import same_numbers, unequal
from mergeid.matchers.inner_products import WeightSimilarity
from mergeid.matchers.protocol import Matcher, MatchTask, Training, check_matcher, get_matcher
from mergeid.matchers.turning import heads_of, matched_turns, paired_heads
from mergeid.models.examples import Examples, enough
from mergeid.models.graph import LARGE
from mergeid.models.loaded import Loaded
from mergeid.models.reached import unread_notes
from mergeid.models.workbench import key_of
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph, Space
from mergeid.neuron_graph.turned import Turn
from mergeid.neuron_graph.turns import candidates, find_turns
from mergeid.nn.folding import effective_state
from mergeid.nn.names import is_asymmetric
from mergeid.request.request import BOTH, Calibration, Matching, Run
from mergeid.results.plan import Plan
from mergeid.stages.gather import Hears, evidence_of, passes
from mergeid.stages.open import Met, Pair, origin_of, pair_of
from mergeid.stages.saved_plan import fingerprint, saved_plan
from mergeid.stages.structure import certified, contradictions, structure_of, why_not, without_data
from mergeid.stages.symmetries import Undone, undone

LEAST = 16
"""Calibration examples that evidence needs."""


@dataclass(frozen=True)
class Structural:
    """What structure is asked for.

    Attributes:
        base: state dict, under the model's keys, of what both were fine-tuned from.
        certify: with radii of stability.
        beside: attach structural margins where both models share a fixed part; they change no decision. Without data
            the structure decides all spaces if it identifies every one, whatever this says.
    """

    base: Mapping[str, torch.Tensor] | None = None
    certify: bool = False
    beside: bool = True


@dataclass
class _Found:
    """What was decided so far."""

    speaks: str
    element: Element
    records: list[SpaceEvidence] = field(default_factory=list)
    matched: Element | None = None
    said: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def make_plan(
    pair: Pair,
    matching: Matching,
    run: Run,
    *,
    examples: Examples | None = None,
    structural: Structural | None = None,
    matched: Element | None = None,
    hears: Hears | None = None,
) -> Plan:
    """Decide for every space of the pair.

    Args:
        examples: calibration data; None: only the weights are compared.
        matched: the match of the matcher that is asked for, where it was found already (`mergeid.matchers.cycle`).
        hears: takes both models' outputs on every calibration batch that is run, as they are. With "always" these are
            of every other example, once; with "auto" of all, and of those that decisions are judged on again.

    Raises `MergeidError` for too few calibration examples, an unknown matcher, and where it cannot do without data.
    """
    named = check_matcher(matching.matcher, matching.mode, examples is not None)
    prints = (fingerprint(pair.a.state()), fingerprint(pair.b.state()))
    saved = None if matching.plan is None else saved_plan(pair, matching.plan, prints)
    mode = matching.mode if saved is None else saved.match
    asked, graph, count = structural or Structural(), pair.graph, 0 if examples is None else len(examples)
    notes = [*_graph_notes(graph), *compared(pair.a.state(), pair.b.state())]
    if examples is not None:
        enough(examples, LEAST, "for the evidence")
    maps = Undone(pair) if mode == "never" or matched is not None else undone(pair, run)
    pair = maps.pair
    notes += maps.notes
    why = why_not(pair.a.state(), asked.base, mode)
    if saved is not None:
        found, count = _Found(saved.evidence, saved.element, saved.records), saved.examples
    elif mode == "never":
        found = _Found("weights" if examples is None else "activations", graph.identity())
    elif examples is None:
        found = _without_examples(pair, matching, run, named, matched, asked if why is None else None)
    else:
        found = _with_examples(pair, matching, run, examples, named, matched, hears)
    notes += found.notes
    said = found.said or {"computed": False, "why": why}
    records = found.records
    if asked.beside and saved is None and examples is not None and why is None:
        run.tell("structure", 0, 1)
        margins = structure_of(pair, found.element, passes(pair.a, examples, run), asked.base, asked.certify, run.seed)
        records = [
            replace(r, structure=margins.records.get(r.id), certificate=margins.certificates[r.id]) for r in records
        ]
        said = margins.said
        notes += margins.notes + contradictions(records, said["orders"])
    elif asked.base is not None and not said["computed"]:
        notes.append(f"the base was not used: {said['why']}")
    if saved is not None:
        notes.append(f"decided before, as {os.fspath(matching.plan or '')} says")
    elif found.speaks == "weights":
        notes.append(
            "no calibration data: only the weights are compared, which is weaker evidence; give --data to compare "
            "activations"
        )
    element, turns = (found.element, ()) if mode == "never" else _turned(pair, found.element, run)
    full, full_turns = (None, ()) if found.matched is None else _turned(pair, found.matched, run)
    if mode != "never" and saved is None:
        notes += [*_copy_notes(pair, element), *unread_notes(graph, element)]
    verdict = _verdict(mode, records, notes)
    settings: dict[str, Any] = {"batch_size": run.batch_size, "weight_share": WEIGHT_SHARE}
    if matching.matcher is not None:
        settings["matcher"] = matching.matcher
    if pair.a.joined is not None:
        settings["heads"] = BOTH
    return Plan(
        pair.a.source,
        pair.b.source,
        pair.a.arch.id,
        mode,
        verdict,
        records,
        notes,
        graph,
        element,
        found.speaks,
        count,
        run.seed,
        settings,
        said,
        full,
        turns,
        full_turns,
        maps.before,
        maps.after,
        fingerprints=prints,
    )


def plan_of(
    met: Met,
    pair: Pair,
    other: Source,
    matching: Matching,
    calibration: Calibration,
    matched: Element | None = None,
) -> Plan:
    """`make_plan` of the first model and another: once on a workbench, unless its match is given (`matched`)."""
    bench = met.bench
    examples = bench.examples(calibration, pair.a)

    def work() -> Plan:
        return make_plan(pair, matching, bench.run, examples=examples, matched=matched)

    if matched is not None:
        return work()
    sources = (key_of(met.models[0]), key_of(other), met.skip, id(bench.reading))
    about = (met.models, other, bench.reading, calibration)
    return bench.kept((*sources, id(calibration.data), calibration.limit, matching), about, work)


def _turned(pair: Pair, element: Element, run: Run) -> tuple[Element, tuple[Turn, ...]]:
    """The heads of B paired anew, and what turns them onto A's; nothing of models that are too large to be tried on,
    and of heads that lie as A's do."""
    graph, a, b = pair.graph, pair.a.state(), pair.b.state()
    maybe = candidates(graph) if graph.turnable is None else graph.turnable
    if not maybe or is_asymmetric(a) or sum(p.numel() for p in pair.a.model.parameters()) >= LARGE:
        return element, ()
    if not matched_turns(maybe, a, heads_of(graph, element, maybe, b)):
        return element, ()
    if graph.turnable is None:
        run.tell("looking for rotations inside attention heads", 0, 1)
        graph.turnable = tuple(
            find_turns(graph, pair.a.model, pair.a.inputs, pair.a.whole_outputs, generator=run.generator())
        )
        give_back()  # a copy of the model, in float64
        if not matched_turns(graph.turnable, a, heads_of(graph, element, graph.turnable, b)):
            return element, ()
    known = graph.turnable
    element = paired_heads(graph, known, element, (a, b))
    return element, matched_turns(known, a, heads_of(graph, element, known, b), least=1.0)


def plan_pair(
    met: Met, matching: Matching, calibration: Calibration, *, base: Source | None = None, certify: bool = False
) -> tuple[Pair, Plan]:
    """The first two models and their plan, with what was found when they were opened among its notes.

    Args:
        base: what both were fine-tuned from.
        certify: with radii of stability.

    Raises `MergeidError` for anything wrong with the input.
    """
    pair = pair_of(met, met.models[1])
    if base is None and not certify:
        made = plan_of(met, pair, met.models[1], matching, calibration)
        return pair, replace(made, notes=[*met.agreed.notes, *made.notes])
    origin = None if base is None else origin_of(met, base, pair.a)
    examples = met.bench.examples(calibration, pair.a)
    made = make_plan(pair, matching, met.bench.run, examples=examples, structural=Structural(origin, certify))
    return pair, replace(made, notes=[*met.agreed.notes, *made.notes])


def _without_examples(
    pair: Pair,
    matching: Matching,
    run: Run,
    named: Matcher | None,
    matched: Element | None,
    structural: Structural | None,
) -> _Found:
    """From weights alone, or structure (`structural`: None where it has nothing to say)."""
    graph, generator = pair.graph, run.generator()
    if matching.mode == "always":
        run.tell("matching", 0, 1)
        task = MatchTask(*pair.weights(), generator)
        return _Found("weights", matched or (named or get_matcher("weight")).match(task))
    found = _Found("weights", graph.identity())
    known = {}
    if structural is not None:
        run.tell("structure", 0, 1)
        known = certified(pair, structural.base)
        found.said, found.notes = without_data(known, structural.certify)
    decided: Decisions | None = decide_from_structure(graph, known) if known else None
    if decided is not None:
        found.speaks = "structure"
    else:
        run.tell("weight matching", 0, 1)
        decided = decide_from_weights(WeightSimilarity(*pair.weights()), generator=generator)
    found.element = decided.element
    found.records = [replace(r, certificate=known.get(r.id)) for r in decided.spaces]
    return found


def _with_examples(
    pair: Pair,
    matching: Matching,
    run: Run,
    examples: Examples,
    named: Matcher | None,
    matched: Element | None,
    hears: Hears | None,
) -> _Found:
    """From activations, judged on the half of the examples that the match has not seen."""
    graph, generator, judged = pair.graph, run.generator(), matching.mode == "auto"
    evidence = evidence_of(pair, examples, run, judged=judged, hears=hears)
    give_back()  # activations
    run.tell("matching", 0, 1)
    correlation = evidence.correlations()
    give_back()  # the sums that they come from
    similarity = WeightSimilarity(*pair.weights())
    usual = named is None or named.name == "combined"
    copied = None
    if usual:
        copied = similarity.copied
        matched = copied or combined_matching(similarity, correlation, generator=generator)
    elif matched is None:
        assert named is not None
        training = _training(pair.a, examples, run)
        matched = named.match(MatchTask(*pair.weights(), generator, correlation, training))
    if not judged:
        return _Found("activations", matched, matched=matched)
    scores: Mapping[str, np.ndarray]
    cosines = _stored(graph, lambda s: np.float32(WEIGHT_SHARE) * similarity.cosines(s, matched))
    if usual:
        scores = WhenAsked(
            [s.id for s in graph.spaces],
            lambda k: cosines[k] + correlation.get(k, np.float32(0)),
            lambda found: int(found.nbytes),
        )
    else:
        # the candidate is the matcher's own pairing wherever the parents' decisions leave it possible
        scores = _stored(graph, lambda s: np.eye(s.size, dtype=np.float32)[matched[s.id]])
    give_back()  # the scores of all passes
    run.tell("judging on held-out examples", 0, 1)
    decided = decide_from_activations(evidence, scores, cosines, matched, seed=run.seed)
    if copied is not None and not _says_copied(pair, decided):
        decided = decided_copy(similarity, copied)
    records = _with_chords(pair, evidence, decided, matched)
    return _Found("activations", decided.element, records, matched)


def _says_copied(pair: Pair, decided: Decisions) -> bool:
    """Whether what was decided of a permuted copy makes it A again, and nobody is told that it cannot be merged."""
    lost = any(r.decision == WILL_NOT for r in decided.spaces)
    return not lost and not any(unequal(*pair.weights(), decided.element))


def _stored(graph: NeuronGraph, make: Callable[[Space], np.ndarray]) -> Mapping[str, np.ndarray]:
    """Matrices of all spaces, in memory where they are small, else on disk."""
    return Stored([s.id for s in graph.spaces], lambda k: make(graph.by_id[k]))


def _training(a: Loaded, examples: Examples, run: Run) -> Training:
    """What a matcher that trains is told of the data."""

    def loss(output: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor | None:
        parts = a.loss(output, dict(batch)) if "labels" in batch else None
        return None if parts is None else parts.loss.sum() / parts.count.sum().clamp(min=1)

    def batches() -> Iterator[dict[str, Any]]:
        device = next(a.model.parameters()).device
        return (to_model(batch, device, input_dtype(a.model)) for batch in examples.batches(run.batch_size))

    return Training(a.model, a.forward, loss, batches)


def _with_chords(pair: Pair, evidence: ActivationEvidence, decided: Decisions, matched: Element) -> list[SpaceEvidence]:
    """The records with the chord deviation under the identity and under the match."""
    graph, element = pair.graph, decided.element
    states = effective_state(pair.a.state()), effective_state(pair.b.state())
    out = []
    for space, record in zip(graph.spaces, decided.spaces, strict=True):
        direct = {**element, space.id: graph.follow(space, element)}
        # a match fitted under other parents than the decided ones is no candidate
        best = matched if record.decision != MATCH and not space.parents else element
        chords = [evidence.chord(space.id, e, *states) for e in (direct, {**element, space.id: best[space.id]})]
        out.append(replace(record, chord_identity=chords[0], chord_match=chords[1]))
    return out


def _graph_notes(graph: NeuronGraph) -> list[str]:
    notes = []
    if graph.unknown_ops:
        ops = ", ".join(f"{op} (at {where or 'the top'})" for op, where in graph.unknown_ops.items())
        notes.append(f"operations without a rule freeze what they touch: {ops}")
    if not graph.spaces:
        notes.append("no axis of this model can be permuted, so it can only be merged as is")
    return notes


def _copy_notes(pair: Pair, element: Element) -> list[str]:
    """What is said where B looks like a permuted copy and the order found does not make it A."""
    weights = pair.weights()
    if not any(unequal(*weights, element)) or not same_numbers(*weights):
        return []
    off = list(unequal(*weights, element))
    return [
        f"every tensor of B holds the same numbers as A's in another order, as a permuted copy of A would, but in the "
        f"order found {len(off)} of {len(weights[0].on_tensor)} still differ (first: {off[0]}), so the merge is not A"
    ]


def _verdict(mode: str, records: list[SpaceEvidence], notes: list[str]) -> str:
    if mode == "never":
        return DIRECT
    if mode == "always":
        return MATCH
    lost = [r for r in records if r.decision == WILL_NOT]
    share = sum(r.share for r in lost) / max(sum(r.share for r in records), 1e-12)
    if lost:
        notes.append(
            f"{len(lost)} of {len(records)} spaces, with {100 * share:.0f} % of the weights, do not correspond in any "
            "order"
        )
    if share > 0.5:
        return WILL_NOT
    return MATCH if any(r.decision == MATCH for r in records) else DIRECT
