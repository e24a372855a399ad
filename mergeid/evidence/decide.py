"""Per space: merge directly, match first, or say that it will not merge.

Parents are decided before what lies in them. Direct if the identity (members in order inside their parents' blocks)
is at least as good within its interval: ties go to the identity, unless the weights of the moved neurons leave no
doubt. Without data the fixed parts speak where they reach from the inputs to every space, else only the weights, and
nothing is promised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.special import ndtri

from mergeid.evidence.anchored import IDENTIFIED, Certificate
from mergeid.evidence.evidence import ActivationEvidence, Judgement, Request
from mergeid.evidence.layers import SpaceRecord
from mergeid.matchers.assignment import TreeAssignment, descendants
from mergeid.neuron_graph.group import same_element
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph, Space

DIRECT, MATCH, WILL_NOT = "direct", "match", "will not merge"

LEAST_CORRELATION = 0.1
"""A space whose best assignment correlates less than this keeps under 55 % of its activations' variance at the
midpoint, (1 + ρ)/2: nothing of the two networks is left to merge."""

TIE = 1e-3
"""Share of the moved neurons' similarity that a match of weights must gain: neurons that are alike stay."""

CLEAR_COSINE = 0.5
"""Moved neurons whose weights fit their new places better by this much, in cosine, on average, need no interval of the
activations above 0: two swapped neurons among many with heavy tails leave a wide one. Independent networks stay below:
the best of n random directions in d dimensions has a cosine of about sqrt(2 ln n / d)."""


@dataclass(frozen=True)
class SpaceEvidence:
    """The decision for one space and every number that led there.

    Attributes:
        decision: "direct", "match" or "will not merge"; why: one line.
        evidence: "activations", "weights", "structure" or "none".
        j_identity, j_match, j_random: mean correlation of paired activations (or cosine of weights).
        iota, iota_low, iota_high: identifiability index, 95 % interval.
        deviation_identity, deviation_match: share of the activations' variance that the midpoint loses, (1 − J)/2.
        gain, gain_low, gain_high: J(match) − J(identity inside the parents' blocks), held-out; from weights alone
            what the match gains as a share of the moved members' inner products.
        moved: neurons that the match moves.
        chord_identity, chord_match: relative chord deviation at the first layer that consumes the space, under the
            identity and under the match, all other spaces as decided (`mergeid.evidence.chord`).
        structure: both models' margins relative to the fixed part that they share; None where there is none.
        certificate: what the fixed parts say of the space, from the network's inputs on; None where there are none.
    """

    id: str
    label: str
    size: int
    blocks: int
    parents: tuple[str, ...]
    share: float
    decision: str
    why: str
    evidence: str
    moved: int = 0
    j_identity: float | None = None
    j_match: float | None = None
    j_random: float | None = None
    iota: float | None = None
    iota_low: float | None = None
    iota_high: float | None = None
    deviation_identity: float | None = None
    deviation_match: float | None = None
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    chord_identity: float | None = None
    chord_match: float | None = None
    structure: SpaceRecord | None = None
    certificate: Certificate | None = None

    def to_json(self) -> dict[str, Any]:
        """Infinite margins as null."""
        plain = asdict(replace(self, structure=None))
        return {**plain, "structure": None if self.structure is None else self.structure.to_json()}


@dataclass
class Decisions:
    """Attributes:
    spaces: one record per space, in the graph's order.
    element: the group element to apply to B.
    """

    spaces: list[SpaceEvidence]
    element: Element


def record_of(
    graph: NeuronGraph, space: Space, decision: str, why: str, evidence: str, moved: int = 0
) -> SpaceEvidence:
    share = graph.share_of(space)
    return SpaceEvidence(
        space.id, space.label, space.size, space.blocks, space.parents, share, decision, why, evidence, moved
    )


def decide_from_activations(
    evidence: ActivationEvidence,
    scores: Mapping[str, np.ndarray],
    cosines: Mapping[str, np.ndarray],
    matched: Element,
    *,
    seed: int,
) -> Decisions:
    """Decide parents first, each space judged with its parents at their current choice, to a fixed point.

    Args:
        evidence: collected moments; its held-out half judges.
        scores: space id -> [size, size] similarities that the match maximises.
        cosines: the part of the scores that comes from the weights: what activations gain must outweigh what the
            weights lose.
        matched: the match of all spaces, fitted on the other half.
    """
    graph = evidence.graph
    # an error of 5 % for the whole plan, whatever the number of spaces
    z = -float(ndtri(0.025 / max(len(graph.spaces), 1)))
    solver = TreeAssignment(graph, scores)
    below = {s.id: [c for c in descendants(graph, s)[1:] if c.id in evidence.taps] for s in graph.spaces}
    current = _first_guess(graph, scores, matched)
    records: dict[str, SpaceEvidence] = {}
    depth = 1 + max((len(_ancestors(graph, s)) for s in graph.spaces), default=0)
    for _ in range(depth + 1):
        direct, best = _candidates(graph, solver, current)
        requests = [Request(s.id, direct[s.id], best[s.id]) for s in graph.spaces if s.id in evidence.taps]
        askers = [r.space for r in requests]
        # a space without activations of its own (heads) is judged by what lies in it
        for s in graph.spaces:
            if s.id not in evidence.taps and below[s.id]:
                without, with_ = tree_candidates(graph, solver, s, current)
                requests += [Request(c.id, without[c.id], with_[c.id]) for c in below[s.id]]
                askers += [s.id] * len(below[s.id])
        judged: dict[str, Judgement] = {}
        for asker, j in zip(askers, evidence.judge(requests, z=z, seed=seed), strict=True):
            if j is not None and (asker not in judged or abs(j.gain) > abs(judged[asker].gain)):
                judged[asker] = j
        new: Element = {}
        for s in graph.spaces:
            follow = graph.follow(s, new)
            choice = solver.choose(s, {**current, **new}) if s.parents else best[s.id]
            moved = int((choice != follow).sum())
            rows = np.arange(s.size)
            now, then = cosines[s.id][rows, follow], cosines[s.id][rows, choice]
            found = judged.get(s.id)
            if found is None:
                # weights speak where all that they are compared with is in the order in which they were
                agreed = all(np.array_equal(current[k], matched[k]) for k in _beside(graph, s))
                to = choice != follow
                gains = agreed and float((then - now)[to].sum()) > TIE * float(np.abs(then[to]).sum())
                records[s.id], matches = _unseen(graph, s, moved if gains else 0), gains
            else:
                records[s.id], matches = _decision(graph, s, found, moved, float((now - then).mean()))
            new[s.id] = choice if matches else follow
        if same_element(new, current):
            break
        current = new
    return Decisions([records[s.id] for s in graph.spaces], current)


def _ancestors(graph: NeuronGraph, space: Space) -> set[str]:
    found: set[str] = set()
    queue = list(space.parents)
    while queue:
        p = queue.pop()
        if p not in found:
            found.add(p)
            queue += graph.by_id[p].parents
    return found


def _first_guess(graph: NeuronGraph, scores: Mapping[str, np.ndarray], matched: Element) -> Element:
    """Parents as matched where the fitted gain is large, else as they are."""
    guess: Element = {}
    for s in graph.spaces:
        follow = graph.follow(s, guess)
        ok = all(np.array_equal(guess[p], matched[p]) for p in s.parents)
        rows = np.arange(s.size)
        score = scores.get(s.id)
        if score is None or not score.any():
            guess[s.id] = matched[s.id] if ok else follow
            continue
        gain = (score[rows, matched[s.id]] - score[rows, follow]).mean() if ok else 0.0
        guess[s.id] = matched[s.id] if gain > 0 else follow
    return guess


def _candidates(graph: NeuronGraph, solver: TreeAssignment, current: Element) -> tuple[Element, Element]:
    """For every space, with its parents as in `current`: members in order, and the best members."""
    direct: Element = {}
    best: Element = {}
    for s in graph.spaces:
        direct[s.id] = graph.follow(s, current)
        best[s.id] = solver.choose(s, current)
    return direct, best


def tree_candidates(
    graph: NeuronGraph, solver: TreeAssignment, space: Space, current: Element
) -> tuple[Element, Element]:
    """The tree under a space at its best, with the space itself in order or at its best."""
    still = {**current, space.id: graph.follow(space, current)}
    for child in descendants(graph, space)[1:]:
        still[child.id] = solver.choose(child, still)
    return still, solver.solve(space, dict(current))


def _beside(graph: NeuronGraph, space: Space) -> set[str]:
    """The other spaces on a space's tensors."""
    return {s.id for a in space.axes for s, _ in graph.on_tensor[a.tensor]} - {space.id}


def _unseen(graph: NeuronGraph, space: Space, moved: int) -> SpaceEvidence:
    """Of a space that no activations speak of, of which weights move so many neurons."""
    if moved:
        why = "no activations to judge by; the weights fit better in another order"
        return record_of(graph, space, MATCH, why, "weights", moved)
    why = "no activations to judge by, so it follows its parents" if space.parents else "no activations to judge by"
    return record_of(graph, space, DIRECT, why, "none")


def _decision(
    graph: NeuronGraph, space: Space, judged: Judgement, moved: int, lost: float
) -> tuple[SpaceEvidence, bool]:
    clear = moved > 0 and judged.gain > 0 and -lost * space.size > CLEAR_COSINE * moved
    matches = moved > 0 and (judged.gain_low > 0 or clear) and judged.gain > lost
    chosen = judged.j_match if matches else judged.j_current
    record = replace(
        record_of(graph, space, DIRECT, "", "activations", moved if matches else 0),
        j_identity=judged.j_identity,
        j_match=judged.j_match,
        j_random=judged.j_random,
        iota=judged.iota,
        iota_low=judged.iota_low,
        iota_high=judged.iota_high,
        deviation_identity=(1 - judged.j_current) / 2,
        deviation_match=(1 - judged.j_match) / 2,
        gain=judged.gain,
        gain_low=judged.gain_low,
        gain_high=judged.gain_high,
    )
    if judged.above_chance <= 0 or chosen < LEAST_CORRELATION:
        why = f"no permutation makes the neurons correspond: correlation {chosen:.2f}, random {judged.j_random:.2f}"
        return replace(record, decision=WILL_NOT, why=why), matches
    if matches:
        raised = f"from {judged.j_current:.2f} to {judged.j_match:.2f}"
        why = f"matching {moved} neurons raises the mean correlation {raised}"
        if judged.gain_low <= 0:
            why += ", and their weights confirm it"
        return replace(record, decision=MATCH, why=why), True
    if moved == 0:
        why = "the neurons correspond as is: the best permutation is the identity"
    elif judged.gain_low > 0:
        why = f"the match gains {judged.gain:.3f} in correlation but separates neurons whose weights correspond"
    else:
        why = f"as is, they correspond as well as matched, within the interval (gain {judged.gain:+.3f})"
    return replace(record, why=why), False


def decide_from_structure(graph: NeuronGraph, certificates: Mapping[str, Certificate]) -> Decisions | None:
    """Every space direct where the structure identifies every one; None where it does not."""
    if any(certificates[s.id].says != IDENTIFIED for s in graph.spaces):
        return None
    records = [
        replace(
            record_of(graph, s, DIRECT, f"identified by structure: {certificates[s.id].why}", "structure"),
            certificate=certificates[s.id],
        )
        for s in graph.spaces
    ]
    return Decisions(records, graph.identity())
