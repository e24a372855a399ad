"""The zoo's later tables: midpoints, the wider zoo, and what validation counts."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from examples_helpers import modules_of, of_one_group

ZOO = Path(__file__).parents[2] / "examples" / "zoo"
MODULES = (
    "tabular", "tasks", "families", "recipes", "training", "measuring", "pairs_table", "build", "baselines", "features",
    "midpoints", "wider_families", "wider", "trials", "rivals", "fit", "validation", "fresh",
)  # fmt: skip


@pytest.fixture(scope="module")
def zoo():
    with modules_of(ZOO, MODULES) as found:
        yield found


@pytest.fixture
def mini(zoo, monkeypatch):
    return of_one_group(zoo, monkeypatch)


def test_midpoints_go_on_and_are_what_they_say(mini, tmp_path):
    first = next(p for p in mini.recipes.work() if p.kind == "independent")
    for _ in range(2):
        assert mini.midpoints.run(tmp_path, tmp_path / "cache", only=first.id) in (0, 1)
    (row,) = mini.pairs_table.read(tmp_path / "midpoints.csv")
    words = ("pair", "family", "data", "kind", "verdict", "made", "default_is")
    f = {k: float(v) for k, v in row.items() if v and k not in words}
    # a mixture never loses more than its parts do on average
    assert f["loss_both"] <= (f["loss_a"] + f["loss_b"]) / 2 + 1e-9
    (a, b), (held, _) = (lambda z: (z.nets(first), z.data(first)))(mini.build.Zoo(tmp_path / "cache"))
    with torch.no_grad():
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            p.copy_((p + q) / 2)
        batch = held.batch()
        plain = torch.nn.functional.cross_entropy(a(batch["arg0"]), batch["labels"]).item()
    assert f["loss_direct"] == pytest.approx(plain - (f["loss_a"] + f["loss_b"]) / 2, abs=1e-4)
    assert f["loss_direct"] == pytest.approx((f["half_direct"] + f["other_direct"]) / 2, abs=1e-4)
    assert f["loss_solved"] < f["loss_direct"]
    merge, _, repair = row["default_is"].partition("+")
    assert merge in ("plain", "mixed", "matched") and repair in ("", "bn", "repair", "solve")


def test_trials_go_on_and_are_what_they_say(mini, tmp_path):
    """The losses are those of `midpoints.csv`, and what the merge says is of inputs that it was not solved on."""
    first = next(p for p in mini.recipes.work() if p.kind == "independent")
    built = mini.build.Zoo(tmp_path / "cache")
    for ways in ((), (), ("direct",)):
        mini.trials.run(tmp_path, built, [first], 9.0, ways)
    rows = {r["way"]: r for r in mini.pairs_table.read(tmp_path / "trials.csv")}
    assert len(rows) == len(mini.pairs_table.read(tmp_path / "trials.csv")), "no way twice"
    assert {"direct", "match", "solved"} <= set(rows)
    mini.midpoints.run(tmp_path, tmp_path / "cache", only=first.id)
    (known,) = mini.pairs_table.read(tmp_path / "midpoints.csv")
    for way in ("direct", "match", "solved"):
        assert float(rows[way]["loss"]) == pytest.approx(float(known[f"loss_{way}"]), abs=1e-5)
        assert float(rows[way]["loss_a"]) == pytest.approx(float(known["loss_a"]), abs=1e-5)
    (a, b), (_, inputs) = built.nets(first), built.data(first)
    with torch.no_grad():
        x = inputs.batch()["arg0"][1::2]
        la, lb = (net(x).double().log_softmax(-1) for net in (a, b))
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            p.copy_((p + q) / 2)
        gap = (la + lb) / 2 - a(x).double().log_softmax(-1)
    best = (la.exp() + lb.exp()).argmax(-1, keepdim=True)
    assert float(rows["direct"]["hard"]) == pytest.approx(float(gap.gather(1, best).mean()), abs=1e-4)
    seen = [set(k for k, v in rows[way].items() if v) for way in ("direct", "solved")]
    assert seen[0] == seen[1] >= {"excess", "shift", "uniform", "told", "sharp", "missed"}


def test_fine_tunes_of_low_rank(zoo, tmp_path):
    """They differ from their base in linear layers alone, by matrices of the rank that was asked for."""
    group = zoo.recipes.Group("mlp", "digits", 5, 12, 2, steps=12)
    first = zoo.wider._low(group)[0]
    base, tuned = (zoo.training.state(m, tmp_path) for m in (first.a.parent, first.a))
    for name, weight in tuned.items():
        gap = weight - base[name]
        if weight.dim() == 2:
            found = int(torch.linalg.matrix_rank(gap.double(), rtol=1e-4))
            assert 1 <= found <= zoo.wider.RANK, name
        else:
            assert not gap.any(), name


def test_the_wider_zoo_is_one(zoo):
    pairs, first = list(zoo.wider.work()), list(zoo.recipes.work())
    assert len({p.id for p in [*pairs, *first]}) == len(pairs) + len(first) >= 900
    assert {m.group.name for p in pairs for m in (p.a, p.b)}.isdisjoint({p.a.group.name for p in first})
    families = {p.a.group.family for p in pairs}
    assert set(zoo.wider_families.WIDER) | {"tabular"} <= families
    assert {"low rank", "collapsed"} <= {p.kind for p in pairs}
    other = next(p for p in pairs if isinstance(p, zoo.wider.Elsewhere) and p.a.group.data == "digits")
    held, known = zoo.wider.WiderZoo(Path()).data(other)
    own = zoo.build.Zoo(Path()).data(other)
    assert torch.equal(held.part.x, own[0].part.x) and not torch.equal(known.part.x, own[1].part.x)


@pytest.mark.parametrize("name", ["gru", "lstm", "groupnorm", "standardised", "mambaout", "nfnet"])
def test_new_families_learn(zoo, name):
    """Logits that depend on the input, and finite gradients everywhere."""
    about = zoo.tasks.shape("packages" if name in ("gru", "lstm") else "digits")
    net = zoo.families.make(name, 16, 1, about, 0).train()
    shape = (4, 1, about.side, about.side)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) if about.side else torch.arange(64).view(4, 16)
    out = net(x)
    assert out.shape == (4, about.classes) and bool((out.detach().std(0) > 0).all())
    out.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())


def test_holm_is_the_closed_test(zoo):
    """Holm's p is the largest Bonferroni p over all sets of hypotheses that hold the one."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        p = {str(i): float(v) for i, v in enumerate(rng.random(5) ** 3)}
        found = zoo.validation.holm(p)
        for name in p:
            sets = [s for k in range(1, 6) for s in combinations(p, k) if name in s]
            assert found[name] == pytest.approx(min(1.0, max(len(s) * min(p[x] for x in s) for s in sets)))


def test_solved_merges_are_described_by_the_best_way(zoo):
    found = zoo.fit.cases(ZOO)
    solved = [c for c in found if c.way == "solved" and c.mode == "inputs"]
    assert len(solved) >= 20
    for c in solved[:20]:
        others = [d for d in found if d.pair["pair"] == c.pair["pair"] and d.mode == "inputs" and d.way != "solved"]
        assert c.features["excess"] == min(d.features["excess"] for d in others)
        assert 0 <= c.nats <= c.features["uniform"] and not np.isnan(c.points)


def test_what_is_fitted_of_the_wider_zoo_is_not_fresh(zoo, monkeypatch):
    rows = [r["pair"] for r in zoo.fit.table.read(zoo.fit.WIDER / "pairs.csv")]
    monkeypatch.setattr(zoo.fit, "FROM_WIDER", len(rows) - 3)
    known = zoo.fit.known()
    fitted = {c.pair["pair"] for c in known.cases}
    assert fitted.isdisjoint(rows[-3:]) and set(rows[:-3]) <= fitted
    assert not {m["pair"] for m in known.midpoints} & set(rows[-3:])
    kept = []
    monkeypatch.setattr(zoo.fresh, "written", lambda predictor, found, made: kept.extend(found) or "")
    monkeypatch.setattr(zoo.fresh.Path, "write_text", lambda *args, **kwargs: 0)
    monkeypatch.setattr("sys.argv", ["fresh.py"])
    zoo.fresh.main()
    assert {c.pair["pair"] for c in kept} == set(rows[-3:])
