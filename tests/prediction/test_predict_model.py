"""The predictor: weights ≥ 0, intervals that hold, and nothing learnt from the group that is left out."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeid.errors import MergeidError
from mergeid.prediction.fitting import Design, Row, area_under_curve, coverage, fit, left_out, ranks_agree
from mergeid.prediction.model import (
    WAYS,
    Model,
    Pool,
    Predictor,
    Term,
    conformal,
    lift,
    lower,
    shipped,
    start,
)

DESIGN = Design("nats", 0.02, (Term("x", 0.02), Term("z", None)), (Term("z", None),))


def rows(seed: int, groups: int = 8, each: int = 30, noise: float = 0.3) -> list[Row]:
    """Targets that follow x with exchangeable errors, and z that has nothing to do with them."""
    rng = np.random.default_rng(seed)
    found = []
    for g in range(groups):
        for _ in range(each):
            t = rng.uniform(0, 6)
            x = float(lower(t, 0.02))
            y = max(0.0, float(lower(0.8 * t + 0.3 + noise * rng.standard_normal(), 0.02)))
            found.append(Row({"x": x, "z": float(rng.uniform(0.5, 2)), "divergence": 0.1}, y, f"g{g}"))
    return found


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 10))
def test_the_scale_goes_back(y: float, scale: float) -> None:
    assert lower(lift(y, scale), scale) == pytest.approx(y, rel=1e-9, abs=1e-9)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 10), st.floats(0.05, 2))
def test_gains_count_as_much_as_they_are_said_to(y: float, scale: float, gains: float) -> None:
    assert lift(-abs(y), scale, gains) == pytest.approx(-gains * lift(abs(y), scale, gains))
    assert lower(lift(y, scale, gains), scale, gains) == pytest.approx(y, rel=1e-9, abs=1e-9)
    # where they do not count there are none
    assert lift(y, scale, 0.0) == lift(max(y, 0.0), scale)
    assert lower(lift(y, scale, 0.0), scale, 0.0) == pytest.approx(max(y, 0.0), rel=1e-9, abs=1e-9)


def gaining(seed: int, groups: int = 8, each: int = 40) -> list[Row]:
    """Targets that follow x on both sides of 0, with errors of the same kind."""
    rng = np.random.default_rng(seed)
    found = []
    for g in range(groups):
        for _ in range(each):
            t = rng.uniform(-3, 3)
            y = float(lower(t + 0.3 * rng.standard_normal(), 0.02, 0.5))
            x = float(lower(t, 0.02, 0.5))
            found.append(Row({"x": x, "z": 1.0, "divergence": 0.1, "uniform": 50.0}, y, f"g{g}"))
    return found


def test_gains_are_predicted_where_they_count() -> None:
    """The same rows, with and without gains: what is told of losses is much the same."""
    telling = fit(replace(DESIGN, gains=0.5), gaining(1))
    silent = fit(DESIGN, gaining(1))
    new = gaining(2, groups=20)
    found = [telling.predict(r.features) for r in new]
    assert 0.86 < coverage(new, found) < 0.95
    assert ranks_agree([i.expected for i in found], [r.target for r in new]) > 0.95
    gained = [(i, r) for i, r in zip(found, new, strict=True) if r.target < -0.5]
    assert len(gained) > 50 and all(i.expected < 0 and i.low < i.expected < i.high for i, _ in gained)
    for row in new:
        assert silent.predict(row.features).low >= 0
    again = Model.from_json(json.loads(json.dumps(telling.to_json())))
    assert [again.predict(r.features).expected for r in new] == pytest.approx([i.expected for i in found])


def test_finds_planted_weights() -> None:
    model = fit(DESIGN, rows(0, noise=0.05))
    assert model.terms[0].weight == pytest.approx(0.8, abs=0.02)
    assert model.terms[1].weight == pytest.approx(0.0, abs=0.05)
    assert model.intercept == pytest.approx(0.3, abs=0.1)


def test_a_higher_feature_never_lowers_the_prediction() -> None:
    rng = np.random.default_rng(1)
    opposite = [replace(r, target=float(rng.uniform(0, 1) / (1 + r.features["x"]))) for r in rows(0)]
    model = fit(DESIGN, opposite)
    assert all(t.weight >= 0 for t in model.terms)
    low, high = ({"x": x, "z": 1.0, "divergence": 0.1} for x in (0.01, 5.0))
    assert model.predict(low).score <= model.predict(high).score


@pytest.mark.parametrize("seed", range(3))
def test_intervals_hold_on_new_groups(seed: int) -> None:
    """Errors that are exchangeable over groups: 90 % of new targets lie inside, and about 5 % beyond each end."""
    known, new = rows(seed, each=60), rows(seed + 100, groups=20, each=40)
    model = fit(DESIGN, known)
    found = [model.predict(r.features) for r in new]
    assert 0.86 < coverage(new, found) < 0.95
    above = np.mean([r.target > i.high for r, i in zip(new, found, strict=True)])
    assert 0.02 < above < 0.09
    chance = [model.predict(r.features, tolerated=0.1).within for r in new]
    assert all(c is not None for c in chance)
    assert float(np.mean(np.array(chance, float))) == pytest.approx(np.mean([r.target <= 0.1 for r in new]), abs=0.05)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=40, max_size=120), st.sampled_from([0.5, 0.8, 0.9]))
def test_quantiles_cover_a_new_one_of_the_same_kind(values: list[float], level: float) -> None:
    """Left out one by one, at least the share `level` of the values lies between the quantiles of the others (ties
    only help): the guarantee of conformal prediction, exactly."""
    inside = 0
    for i, x in enumerate(values):
        rest = sorted(values[:i] + values[i + 1 :])
        low, high = conformal(rest, [1 / len(rest)] * len(rest), level)
        inside += low <= x <= high
    assert inside >= math.floor(level * len(values))


def test_intervals_hold_on_groups_that_differ() -> None:
    """Groups differ by an offset that is large beside what varies inside them: intervals widen until the mean new group
    is covered, as quantiles of all residuals together would not be."""
    rng = np.random.default_rng(0)

    def drawn(count: int) -> list[Row]:
        return [
            Row(
                {"x": x, "z": 1.0, "divergence": 0.1},
                float(lower(lift(x, 0.02) + s + rng.normal(0, 0.1), 0.02)),
                f"{k}",
            )
            for k, s in enumerate(rng.normal(0, 0.5, count))
            for x in rng.uniform(0.5, 5, 20)
        ]

    held = []
    for _ in range(6):
        model = fit(DESIGN, drawn(12))
        assert model.pools["all"].stretch > 1
        new = drawn(20)
        held.append(coverage(new, [model.predict(r.features) for r in new]))
    assert 0.84 < float(np.mean(held)) < 0.97


def test_an_interval_that_begins_at_0_misses_above_all_that_it_may() -> None:
    """Of pairs whose interval begins at 0 a tenth loses more than its end, as of all others a tenth lies outside: half
    of it would be 95 %."""
    rng = np.random.default_rng(2)

    def some(groups: int) -> list[Row]:
        return [
            Row(
                {"x": x, "z": 1.0, "divergence": 0.1},
                float(lower(max(lift(x, 0.02) + rng.normal(0, 0.5), 0), 0.02)),
                f"g{g}",
            )
            for g in range(groups)
            for x in (*rng.uniform(0, 0.05, 60), *rng.uniform(0.3, 2, 60))
        ]

    held: dict[bool, list[bool]] = {True: [], False: []}
    for _ in range(4):
        model, new = fit(DESIGN, some(12)), some(40)
        for r in new:
            found = model.predict(r.features)
            held[found.low == 0].append(found.holds(r.target))
    assert min(map(len, held.values())) > 1000
    for kind in held.values():
        assert 0.87 < float(np.mean(kind)) < 0.93


def test_groups_that_are_alike_need_no_stretch() -> None:
    assert fit(DESIGN, rows(0, groups=12, each=60)).pools["all"].stretch < 1.25


def test_few_residuals_give_no_interval() -> None:
    assert conformal([0.1, -0.1], [0.5, 0.5], 0.9) == (-math.inf, math.inf)
    assert conformal([], [], 0.9) == (-math.inf, math.inf)


def test_a_group_left_out_is_not_looked_at() -> None:
    known = rows(0, groups=4, each=12)
    changed = [replace(r, target=r.target * 50 + 3) if r.group == "g1" else r for r in known]
    before, after = left_out(DESIGN, known), left_out(DESIGN, changed)
    same = [b == a for b, a in zip(before, after, strict=True)]
    assert all(s for s, r in zip(same, known, strict=True) if r.group == "g1")
    assert not any(s for s, r in zip(same, known, strict=True) if r.group != "g1")


def test_every_group_counts_alike() -> None:
    known = rows(0, groups=3, each=20)
    twice = known + [r for r in known if r.group == "g2"]
    one, two = fit(DESIGN, known), fit(DESIGN, twice)
    assert one.intercept == pytest.approx(two.intercept) and one.terms[0].weight == pytest.approx(two.terms[0].weight)


def test_what_lies_outside_is_widened_and_then_refused() -> None:
    model = fit(DESIGN, rows(0))
    inside, near, far = (model.predict({"x": x, "z": 1.0, "divergence": 0.1}) for x in (1.0, 60.0, 1e9))
    assert inside.beyond == 0 and inside.trusted
    assert 0 < near.beyond < 1 and near.trusted

    def width(at: float) -> float:
        found = model.predict({"x": at, "z": 1.0, "divergence": 0.1})
        return float(lift(found.high, 0.02) - found.score)

    assert width(60.0) == pytest.approx(width(1.0) * (1 + near.beyond), rel=1e-6)
    assert not far.trusted


def test_what_is_not_a_number_is_refused() -> None:
    found = fit(DESIGN, rows(0)).predict({"x": float("nan"), "z": 1.0, "divergence": 0.1})
    assert not found.trusted and found.low == 0 and math.isinf(found.high)
    known = fit(DESIGN, rows(0)).predict({"x": float("nan"), "z": 1.0, "divergence": 0.1, "uniform": math.log(4)})
    assert not known.trusted and known.high == math.log(4)


def test_one_and_the_same_model_loses_nothing() -> None:
    found = fit(DESIGN, rows(0)).predict({"x": 0.0, "z": 1.0, "divergence": 0.0, "deviation": 0.0}, tolerated=0.0)
    assert (found.expected, found.low, found.high, found.within) == (0, 0, 0, 1)


def test_through_json() -> None:
    model = fit(DESIGN, rows(0))
    predictor = Predictor("t", {"pairs": 1}, {("inputs", "nats", "direct"): model})
    text = json.dumps(predictor.to_json())
    again = Predictor.from_json(json.loads(text)).model("inputs", "nats", "direct")
    assert again is not None
    for r in rows(5, groups=1):
        one, two = model.predict(r.features), again.predict(r.features)
        assert one.expected == pytest.approx(two.expected) and one.high == pytest.approx(two.high, rel=1e-2)
    with pytest.raises(MergeidError, match=r"mergeid\.predictor/4"):
        Predictor.from_json({"format": "other"})


def test_the_shipped_coefficients() -> None:
    found = shipped()
    known = {
        m: {w for mode, unit, w in found.models if (mode, unit) == (m, "nats")} for m in ("inputs", "weights", "trial")
    }
    assert known["inputs"] == set(WAYS) - {"leaning"} and known["trial"] == set(WAYS)
    assert known["weights"] == {"direct", "matched"}
    for model in found.models.values():
        assert isinstance(model, Model) and all(t.weight >= 0 for t in model.terms)
        assert any(t.weight > 0 for t in model.terms)
        assert "all" in model.pools
        for pool in model.pools.values():
            assert list(pool.residuals) == sorted(pool.residuals) and sum(pool.shares) == pytest.approx(1, abs=1e-3)


# -- physical limits ----------------------------------------------------------------------------------------

NUMBERS = (0.0, -0.0, 1e-300, -1e-9, 1e9, -1e9, 1e300, -1e300, math.inf, -math.inf, math.nan)


def drawn(rng: np.random.Generator, names: list[str]) -> dict[str, float]:
    """Anything that could reach the predictor: ordinary, of any size and sign, no number at all."""
    kinds = rng.random(len(names))
    wide = rng.standard_normal(len(names)) * 10 ** rng.uniform(-6, 6, len(names))
    values = [
        float(rng.choice(NUMBERS)) if kind < 0.05 else float(w if kind < 0.5 else abs(rng.normal(0, 0.5)))
        for kind, w in zip(kinds, wide, strict=True)
    ]
    classes = int(rng.choice([2, 3, 10, 1000, 128_000]))
    return {**dict(zip(names, values, strict=True)), "uniform": math.log(classes), "told": float(rng.random())}


def test_nothing_leaves_its_physical_limits() -> None:
    """10,000 random inputs to the predictor, over all its models."""
    models = list(shipped().models.values())
    names = sorted({t.feature for m in models for t in (*m.terms, *m.spreads)} | {"cosine", "divergence", "deviation"})
    rng = np.random.default_rng(18)
    for k in range(10_000):
        model, features = models[k % len(models)], drawn(rng, names)
        most = 100.0 if model.unit == "points" else features["uniform"]
        least = -most if model.gains else 0.0
        tolerated = float(10 ** rng.uniform(-5, 2))
        found = model.predict(features, tolerated=tolerated)
        assert least <= found.low <= found.expected <= found.high <= most, (features, found)
        assert found.within is None or 0 <= found.within <= 1
        assert found.open == (model.unit == "nats" and found.high == most) and found.holds(found.expected)
        assert found.holds(2 * most + 1) == found.open and not found.holds(found.low - 0.1, 0.05)
        assert (found.within is None) <= (not found.trusted)
        more = model.predict(features, tolerated=2 * tolerated)
        assert found.within is None or (more.within is not None and more.within >= found.within)
        json.dumps(found.to_json())


def test_collapsed_and_unlike_networks_are_not_trusted() -> None:
    model = replace(fit(DESIGN, rows(0)), collapsed=0.02)
    plain = {"x": 1.0, "z": 1.0, "divergence": 0.1, "uniform": math.log(10)}
    assert model.predict({**plain, "told": 0.5}).trusted
    dead = model.predict({**plain, "told": 0.001})
    assert dead.collapsed and not dead.trusted and dead.to_json()["trusted"] is False
    # each term inside its range, together where no pair was
    rng = np.random.default_rng(0)
    xs = [float(lower(t, 0.02)) for t in rng.uniform(0, 5, 200)]
    along = [
        Row({"x": x, "z": math.exp(lift(x, 0.02) / 5), "divergence": 0.1}, x, f"g{i % 5}") for i, x in enumerate(xs)
    ]
    narrow, end = fit(DESIGN, along), float(lower(4.9, 0.02))
    on, off = ({"x": end, "z": z, "divergence": 0.1} for z in (math.exp(0.97), 1.1))
    assert all(t.beyond(off) == 0 for t in narrow.terms)
    assert narrow.predict(on).trusted and not narrow.predict(off).trusted


def test_pairs_of_one_start_have_an_interval_of_their_own() -> None:
    """Errors of pairs from one start are a tenth of the others': so are their intervals, and both hold."""
    rng = np.random.default_rng(4)

    def some(groups: int) -> list[Row]:
        return [
            Row(
                {"x": x, "z": 1.0, "divergence": 0.1, "cosine": c},
                float(lower(lift(x, 0.02) + rng.normal(0, 0.05 if c > 0.5 else 0.5), 0.02)),
                f"g{g}",
            )
            for g in range(groups)
            for x in rng.uniform(0.5, 5, 20)
            for c in (0.0, 0.9)
        ]

    model, new = fit(DESIGN, some(10)), some(10)
    assert set(model.pools) == {"all", "shared", "apart"}
    spans = {}
    for kind in ("shared", "apart"):
        own = [r for r in new if start(r.features) == kind]
        found = [model.predict(r.features) for r in own]
        assert 0.82 < coverage(own, found) < 0.97
        spans[kind] = float(np.median([lift(i.high, 0.02) - lift(i.low, 0.02) for i in found]))
    assert spans["shared"] < 0.2 * spans["apart"]
    assert isinstance(model.pools["all"], Pool)


def test_rank_figures_against_their_definitions() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, 40), rng.integers(0, 9, 40)
    assert ranks_agree(x.tolist(), y.tolist()) == pytest.approx(spearmanr(x, y)[0])
    bad = y > 4
    pairs = [(p > q) + 0.5 * (p == q) for p in x[bad] for q in x[~bad]]
    assert area_under_curve(x.tolist(), bad.tolist()) == pytest.approx(np.mean(pairs))
