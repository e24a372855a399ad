"""Per space from the weights alone: keep the order, or match first."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Generator

from mergeid.basics.when_asked import WhenAsked
from mergeid.evidence.decide import DIRECT, MATCH, TIE, Decisions, SpaceEvidence, record_of, tree_candidates
from mergeid.matchers.assignment import ROWS, TreeAssignment, descendants
from mergeid.matchers.inner_products import WeightSimilarity
from mergeid.matchers.plain import PlainMatch, seen_plainly
from mergeid.matchers.weight import good_start, weight_matching
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph, Space

NULL_SIGMAS = 4.0
"""Standard deviations of a random permutation's score above which unseen weights confirm a match."""


def decide_from_weights(similarity: WeightSimilarity, *, generator: Generator) -> Decisions:
    """Weight evidence alone: the better order of the weights counts, and ties go to the identity.

    Where nothing corresponds, a match costs nothing, since the identity is no better than it; where something does,
    networks of one origin keep their order, as their weights are nearest to themselves. Whether weights that the match
    has not seen confirm it is reported, and decides nothing. The order of a permuted copy is taken as it is found.
    """
    graph = similarity.graph
    if similarity.copied is not None:
        return decided_copy(similarity, similarity.copied)
    accepted: set[str] = {s.id for s in graph.spaces}
    element = graph.identity()
    records: dict[str, SpaceEvidence] = {}
    matched = weight_matching(similarity, generator=generator, element=good_start(similarity))
    for _ in range(3):
        scores, halves = _scores(similarity, matched), _halves(similarity, matched, generator)
        fit, full = TreeAssignment(graph, halves), TreeAssignment(graph, scores)
        element = {}
        before = set(accepted)
        for s in graph.spaces:
            follow = graph.follow(s, element)
            start = _completed(graph, {**element, s.id: follow}, matched)
            seen = _plain(similarity, s, follow, matched) if s.id in accepted else None
            if seen is not None:
                element[s.id], records[s.id] = seen.perm, _seen_record(graph, s, follow, seen)
                continue
            tree = [c for c in descendants(graph, s) if scores[c.id].any()]
            still, best = tree_candidates(graph, full, s, start) if s.id in accepted else (start, start)
            # where it moves, what lies in it moves too, and may say more (rows of heads under a norm's gains)
            judged = [s] if s in tree and np.array_equal(best[s.id], follow) else tree
            fitted = tree_candidates(graph, fit, s, start)[1]
            gain, size, moved, z = 0.0, 0.0, 0, 0.0
            mean = var = unseen = 0.0
            for c in judged:
                now = follow if c is s else still[c.id]
                to = np.flatnonzero(best[c.id] != now)
                gain += float((scores[c.id][to, best[c.id][to]] - scores[c.id][to, now[to]]).sum())
                size += float(np.abs(scores[c.id][to, best[c.id][to]]).sum())
                moved += len(to)
                found = _held_out(scores[c.id], halves[c.id], c, fitted[c.id])
                unseen, mean, var = unseen + found[0], mean + found[1], var + found[2]
            if var > 0:
                z = (unseen - mean) / float(np.sqrt(var))
            matches = s.id in accepted and moved > 0 and gain > TIE * size
            choice = full.choose(s, start) if matches else follow
            element[s.id] = choice
            records[s.id] = _weight_record(
                graph, s, matches, int((choice != follow).sum()), gain / size if size else None, z if judged else None
            )
            if moved and not matches:
                accepted.discard(s.id)
        if accepted == before:
            break
        matched = weight_matching(similarity, generator=generator, only=accepted)
    return Decisions([records[s.id] for s in graph.spaces], element)


def decided_copy(similarity: WeightSimilarity, copied: Element) -> Decisions:
    """The order of a permuted copy, space by space."""
    graph = similarity.graph
    records = []
    for s in graph.spaces:
        now, perm = graph.follow(s, copied), copied[s.id]
        moved = perm != now
        decision, order = (MATCH, "in another order") if moved.any() else (DIRECT, "as they are")
        why = f"the models are copies: with these neurons {order}, all weights are equal"
        made = record_of(graph, s, decision, why, "weights", int(moved.sum()))
        if moved.any():
            fit, stay = (
                similarity.paired(s.axes, p, {**copied, s.id: p}).cpu().numpy()[moved].sum() for p in (perm, now)
            )
            made = replace(made, gain=float((fit - stay) / fit) if fit else None)
        records.append(made)
    return Decisions(records, copied)


def _plain(similarity: WeightSimilarity, space: Space, now: np.ndarray, matched: Element) -> PlainMatch | None:
    return seen_plainly(similarity, descendants(similarity.graph, space), {**matched, space.id: now})


def _seen_record(graph: NeuronGraph, space: Space, now: np.ndarray, seen: PlainMatch) -> SpaceEvidence:
    """What is proven is no tie, and needs no weights that the match has not seen to confirm it."""
    to = seen.perm != now
    decision, order = (MATCH, "in another order") if to.any() else (DIRECT, "as they are")
    why = f"the weights fit best {order}, plainly for every neuron"
    made = record_of(graph, space, decision, why, "weights", int(to.sum()))
    return replace(made, gain=seen.gain / float(np.abs(seen.pairs[to]).sum()) if to.any() else None)


def _completed(graph: NeuronGraph, decided: Element, matched: Element) -> Element:
    """An element of the group: `decided`, and the other spaces as matched where their parents are, else in order."""
    out: Element = {}
    for s in graph.spaces:
        if s.id in decided:
            out[s.id] = decided[s.id]
        else:
            kept = all(np.array_equal(out[p], matched[p]) for p in s.parents)
            out[s.id] = matched[s.id] if kept else graph.follow(s, out)
    return out


def _scores(similarity: WeightSimilarity, element: Element) -> WhenAsked[np.ndarray]:
    graph = similarity.graph
    return WhenAsked([s.id for s in graph.spaces], lambda k: similarity.scores(graph.by_id[k], element), _bytes)


def _halves(similarity: WeightSimilarity, element: Element, generator: Generator) -> WhenAsked[np.ndarray]:
    """Scores from a random half of the weights, the same whenever they are asked for."""
    graph = similarity.graph
    ids = [s.id for s in graph.spaces]
    seeds = dict(zip(ids, torch.randint(2**62, (len(ids),), generator=generator).tolist(), strict=True))

    def half(k: str) -> np.ndarray:
        return similarity.half(graph.by_id[k], element, torch.Generator().manual_seed(seeds[k]))

    return WhenAsked(ids, half, _bytes)


def _bytes(value: np.ndarray) -> int:
    return int(value.nbytes)


def _held_out(score: np.ndarray, half: np.ndarray, space: Space, perm: np.ndarray) -> tuple[float, float, float]:
    """Σ held[i, perm[i]] where held = score − half, and mean and variance of that for permutations that are uniform
    inside every block (Hoeffding 1951). A few rows at a time, in float64."""
    at = np.arange(space.size)
    unseen = float((score[at, perm].astype(np.float64) - half[at, perm]).sum())
    mean = var = 0.0
    m = space.members
    for b in range(space.blocks):
        block = slice(b * m, (b + 1) * m)
        rows, columns, squares = np.zeros(m), np.zeros(m), 0.0
        for begin in range(0, m, ROWS):
            some = slice(begin, begin + ROWS)
            held = score[block, block][some].astype(np.float64) - half[block, block][some]
            rows[some] = held.sum(1)
            columns += held.sum(0)
            squares += float((held**2).sum())
        mean += float(rows.sum()) / m
        if m > 1:
            centred = squares - float((rows**2).sum() + (columns**2).sum()) / m + (float(rows.sum()) / m) ** 2
            var += max(centred, 0.0) / (m - 1)
    return unseen, mean, var


def _weight_record(
    graph: NeuronGraph, space: Space, matches: bool, moved: int, gain: float | None, z: float | None
) -> SpaceEvidence:
    if z is None:
        why = "no weights to judge by"
    elif matches:
        confirmed = "confirm" if z > NULL_SIGMAS else "do not confirm"
        why = f"the weights fit better in another order; held-out ones {confirmed} it ({z:.0f} standard deviations)"
    else:
        why = "the weights fit best as they are"
    return replace(record_of(graph, space, MATCH if matches else DIRECT, why, "weights", moved), gain=gain)
