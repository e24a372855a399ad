"""The rules by which a space is decided, each at its boundary; and that deciding many of them errs no more often."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mergeid.evidence import decide, decide_weights
from mergeid.evidence.anchored import IDENTIFIED, NOT, Certificate
from mergeid.evidence.decide import DIRECT, MATCH, WILL_NOT, _decision, _unseen, decide_from_structure
from mergeid.evidence.decide_weights import _held_out, _weight_record
from mergeid.evidence.evidence import Judgement, _positions, _row_values, _same_copy, judge
from mergeid.neuron_graph.neuron_graph import Space

GRAPH = cast(Any, SimpleNamespace(share_of=lambda space: 0.25))


def space(size: int = 8, blocks: int = 1, parents: tuple[str, ...] = ()) -> Space:
    return Space("s", "hidden", size, blocks, parents, np.zeros((blocks, 0), np.int64), ())


JUDGED = Judgement(0.5, 0.5, 0.8, 0.0, 0.6, 0.5, 0.7, 0.3, 0.2, 0.4, 0.3, 64)
"""A match that is better beyond doubt."""


# -- one space ----------------------------------------------------------------------------------------------


def test_the_record_says_what_was_measured() -> None:
    record, matches = _decision(GRAPH, space(), JUDGED, 3, 0.1)
    assert matches and (record.decision, record.evidence, record.moved, record.share) == (MATCH, "activations", 3, 0.25)
    assert (record.j_identity, record.j_match, record.j_random) == (0.5, 0.8, 0.0)
    assert (record.iota, record.iota_low, record.iota_high) == (0.6, 0.5, 0.7)
    assert (record.gain, record.gain_low, record.gain_high) == (0.3, 0.2, 0.4)
    assert record.deviation_identity == pytest.approx((1 - 0.5) / 2)
    assert record.deviation_match == pytest.approx((1 - 0.8) / 2)


@pytest.mark.parametrize(
    ("changes", "moved", "lost", "decision"),
    [
        ({}, 3, 0.1, MATCH),
        ({}, 0, 0.1, DIRECT),  # nothing to match
        ({"gain_low": 1e-9}, 3, 0.1, MATCH),
        ({"gain_low": 0.0}, 3, 0.1, DIRECT),  # ties go to the identity
        ({"gain": 0.1}, 3, 0.1, DIRECT),  # what activations gain must outweigh what the weights lose
        ({"gain": 0.1 + 1e-9}, 3, 0.1, MATCH),
        ({"gain_low": -0.1}, 4, -0.25, DIRECT),  # 8 · 0.25 = 2 of 0.5 · 4 = 2: not clear
        ({"gain_low": -0.1}, 4, -0.2500001, MATCH),  # the weights leave no doubt
        ({"gain_low": -0.1, "gain": -0.01}, 4, -0.9, DIRECT),  # whatever they say, if nothing is gained
        ({"gain_low": -0.1, "gain": 0.0}, 4, -0.9, DIRECT),
        ({"above_chance": 0.0}, 3, 0.1, WILL_NOT),
        ({"above_chance": 1e-9}, 3, 0.1, MATCH),
        ({"j_match": decide.LEAST_CORRELATION}, 3, 0.1, MATCH),
        ({"j_match": decide.LEAST_CORRELATION - 1e-9}, 3, 0.1, WILL_NOT),
        ({"j_match": 0.0}, 0, 0.1, DIRECT),  # the correlation that counts is that of the chosen order
        ({"j_current": decide.LEAST_CORRELATION - 1e-9}, 0, 0.1, WILL_NOT),
    ],
)
def test_thresholds_at_their_boundary(changes: dict[str, float], moved: int, lost: float, decision: str) -> None:
    record, matches = _decision(GRAPH, space(), replace(JUDGED, **changes), moved, lost)
    assert record.decision == decision
    assert (record.moved > 0) == matches and record.moved in (0, moved)
    if decision == DIRECT:
        assert not matches
    assert record.why


def test_reasons_tell_the_cases_apart() -> None:
    """Why a space is merged as it lies: nothing moves, no significance, or weights that would be parted."""
    told = [
        _decision(GRAPH, space(), replace(JUDGED, **changes), moved, lost)[0].why
        for changes, moved, lost in (({}, 0, 0.1), ({"gain_low": -0.1}, 3, 0.1), ({}, 3, 0.9))
    ]
    assert "identity" in told[0] and "interval" in told[1] and "separates neurons" in told[2]
    doubtless = _decision(GRAPH, space(), replace(JUDGED, gain_low=-0.1), 4, -0.9)[0].why
    assert (
        "weights confirm it" in doubtless
        and "weights confirm it" not in _decision(GRAPH, space(), JUDGED, 4, -0.9)[0].why
    )


def test_without_activations_a_space_lies_as_its_parents_or_weights_say() -> None:
    for parents, word in (((), ""), (("p",), "follows its parents")):
        record = _unseen(GRAPH, space(parents=parents), 0)
        assert (record.decision, record.evidence, record.moved) == (DIRECT, "none", 0)
        moved = _unseen(GRAPH, space(parents=parents), 5)
        assert (moved.decision, moved.evidence, moved.moved) == (MATCH, "weights", 5)
        assert word in record.why and ("follows" in record.why) == bool(parents)


@pytest.mark.parametrize(("z", "word"), [(4.0, "do not confirm"), (4.0 + 1e-9, "held-out ones confirm")])
def test_when_unseen_weights_confirm(z: float, word: str) -> None:
    record = _weight_record(GRAPH, space(), True, 3, 0.2, z)
    assert word in record.why and (record.decision, record.moved, record.gain) == (MATCH, 3, 0.2)
    stays = _weight_record(GRAPH, space(), False, 0, 0.0, z)
    assert stays.decision == DIRECT and stays.evidence == "weights"
    assert "no weights" in _weight_record(GRAPH, space(), False, 0, None, None).why


def test_structure_decides_only_where_it_identifies_every_space() -> None:
    known = {name: Certificate(name, IDENTIFIED, "why") for name in "ab"}
    spaces = [replace(space(), id=name) for name in "ab"]
    graph = cast(Any, SimpleNamespace(spaces=spaces, share_of=lambda s: 0.5, identity=lambda: {"a": 1}))
    found = decide_from_structure(graph, known)
    assert found is not None and found.element == {"a": 1}
    assert [(r.id, r.decision, r.evidence, r.certificate) for r in found.spaces] == [
        (name, DIRECT, "structure", known[name]) for name in "ab"
    ]
    assert decide_from_structure(graph, {**known, "b": Certificate("b", NOT, "why")}) is None


# -- chance --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 100])
@pytest.mark.parametrize(("blocks", "members"), [(1, 4), (2, 3), (3, 1)])
def test_the_score_of_a_random_permutation_by_brute_force(
    blocks: int, members: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decide_weights, "ROWS", rows)
    generator = np.random.default_rng(blocks)
    score, half = (generator.normal(size=(blocks * members, blocks * members)) for _ in range(2))
    every = list(permutations(range(members)))
    sums = [
        sum((score - half)[b * members + i, b * members + p[i]] for b, p in enumerate(chosen) for i in range(members))
        for chosen in product(every, repeat=blocks)
    ]
    perm = generator.permutation(blocks * members)
    unseen, mean, var = _held_out(score, half, space(blocks * members, blocks), perm)
    assert unseen == pytest.approx((score - half)[np.arange(len(perm)), perm].sum())
    assert mean == pytest.approx(np.mean(sums)) and var == pytest.approx(np.var(sums), abs=1e-12)


def tables(generator: np.random.Generator, gain: float, examples: int = 64) -> np.ndarray:
    """Held-out sums [examples, 5] of one row each: a match that gains so much on average, with noise as large as it."""
    base = 0.5 + 0.05 * generator.normal(size=examples)
    match = base + gain + 0.05 * generator.normal(size=examples)
    return np.stack([base, base, match, 0 * base, np.ones(examples)], 1)


@pytest.mark.parametrize("z", [1.0, 1.96, 3.3])
def test_the_interval_of_a_gain_is_that_of_its_standard_error(z: float) -> None:
    table = tables(np.random.default_rng(3), 0.02)
    found = judge(table, z=z, seed=0, resamples=20_000)
    paired = table[:, 2] - table[:, 1]
    error = paired.std(ddof=1) / np.sqrt(len(paired))
    assert found.gain == pytest.approx(paired.mean()) and found.examples == len(table)
    assert found.gain - found.gain_low == pytest.approx(z * error, rel=0.03)
    assert found.gain_high - found.gain == pytest.approx(z * error, rel=0.03)
    assert (found.j_identity, found.j_match, found.j_random) == pytest.approx(table.mean(0)[[0, 2, 3]].tolist())


def test_rows_count_and_not_examples() -> None:
    """An example of many rows counts as often as it has rows."""
    one = np.array([[2.0, 2.0, 4.0, 0.0, 4.0], [0.1, 0.1, 0.2, 0.0, 1.0], [0.3, 0.3, 0.3, 0.0, 1.0], [0, 0, 0, 0, 1]])
    found = judge(one, z=1.0, seed=0)
    assert found.j_current == pytest.approx(2.4 / 7) and found.j_match == pytest.approx(4.5 / 7)
    assert found.iota == pytest.approx(2.4 / 4.5)


def test_the_index_needs_a_match_above_chance() -> None:
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(64, 4))
    chance = np.concatenate([noise - noise.mean(0), np.ones((64, 1))], 1)
    found = judge(chance, z=1.0, seed=0)
    assert found.iota is None and found.iota_low is None and found.iota_high is None and found.above_chance < 0
    clear = judge(tables(generator, 0.4), z=1.0, seed=0)
    assert clear.iota is not None and clear.iota_low is not None and clear.iota_high is not None
    assert 0 < clear.iota_low < clear.iota < clear.iota_high < 1
    assert clear.above_chance == pytest.approx(clear.j_match, abs=0.05) and clear.above_chance < clear.j_match
    worse = judge(tables(generator, -0.4), z=1.0, seed=0)  # then the order as it is is what may be above chance
    assert worse.above_chance == pytest.approx(worse.j_current, abs=0.05)


def test_a_plan_of_many_spaces_errs_as_rarely_as_one_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bonferroni: the interval's width is the normal quantile of 5 % shared out to all spaces, on both sides; and in
    plans of 20 spaces without any gain, next to none finds one."""
    asked: list[float] = []

    class Evidence:
        def __init__(self, count: int) -> None:
            spaces = [replace(space(2), id=str(i)) for i in range(count)]
            self.graph = SimpleNamespace(
                spaces=spaces, by_id={s.id: s for s in spaces}, share_of=lambda s: 0.0, follow=lambda s, e: np.arange(2)
            )
            self.taps = {s.id: () for s in spaces}

        def judge(self, requests: Any, *, z: float, seed: int) -> list[None]:
            asked.append(z)
            return [None] * len(requests)

    class Solver:
        def __init__(self, graph: Any, scores: Any) -> None: ...

        def choose(self, s: Any, element: Any) -> np.ndarray:
            return np.arange(2)

    monkeypatch.setattr(decide, "TreeAssignment", Solver)
    monkeypatch.setattr(decide, "descendants", lambda graph, s: [s])
    for count in (1, 20, 400):
        evidence = cast(Any, Evidence(count))
        same = {s.id: np.arange(2) for s in evidence.graph.spaces}
        decide.decide_from_activations(evidence, {}, {k: np.eye(2) for k in same}, same, seed=0)
        assert set(asked) == {asked[0]} and asked[0] == pytest.approx(stats.norm.isf(0.05 / (2 * count)))
        z = asked[0]
        asked.clear()
        if count == 20:
            generator = np.random.default_rng(7)
            found = [
                any(judge(tables(generator, 0.0), z=z, seed=i, resamples=100).gain_low > 0 for i in range(count))
                for _ in range(40)
            ]
            assert sum(found) <= 4  # without the correction every third plan would


# -- rows ----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(members=st.lists(st.integers(0, 3), min_size=1, max_size=8), data=st.data())
def test_positions_take_occurrences_in_order(members: list[int], data: st.DataObject) -> None:
    """The k-th occurrence of a member goes where the k-th of its image stands, in taps that hold members twice."""
    known = sorted(set(members))
    held = np.array([known.index(m) for m in members])
    counts = {m: members.count(m) for m in known}
    alike = [m for m in known if counts[m] == counts[known[0]]]
    image = data.draw(st.permutations(alike))
    perm = np.array([known.index(dict(zip(alike, image, strict=True)).get(m, m)) for m in known])
    found = _positions(held, perm)
    for i, m in enumerate(held):
        places = [j for j, other in enumerate(held) if other == perm[m]]
        assert found[i] == places[list(held[:i]).count(m)]
    copies = _same_copy(held)
    rank = [list(held[:i]).count(m) for i, m in enumerate(held)]
    assert copies.tolist() == [[float(a == b) for b in rank] for a in rank]


def test_values_of_rows_against_numpy() -> None:
    """Mean correlation of paired neurons, row by row; a neuron that never varies correlates with nothing."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(30, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    a[:, 2] = 1.5
    stds = a.std(0, correction=0), b.std(0, correction=0)
    held = cast(Any, SimpleNamespace(mean=(a.mean(0), b.mean(0)), std=stds))
    perm = np.array([1, 0, 2, 4, 3])
    found = _row_values(a, b, held, np.arange(5), (np.arange(5), np.arange(5), perm)).mean(0)
    za = ((a - a.mean(0)) / stds[0].clamp(min=1e-30)).numpy()
    zb = ((b - b.mean(0)) / stds[1]).numpy()
    correlation = za.T @ zb / len(za)
    assert found[0] == pytest.approx(np.trace(correlation) / 4) and found[1] == found[0]
    assert found[2] == pytest.approx(correlation[np.arange(5), perm].sum() / 4)
    assert found[3] == pytest.approx(correlation.sum() / 20)
