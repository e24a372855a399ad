"""Whether the best partner is found: the script on networks of a second, and what its report counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from examples_helpers import modules_of

ZOO = Path(__file__).parents[2] / "examples" / "zoo"
MODULES = (
    "tabular", "tasks", "families", "recipes", "training", "measuring", "pairs_table", "build", "baselines", "features",
    "midpoints", "wider_families", "wider", "rivals", "fit", "validation", "ranking_report", "ranking",
)  # fmt: skip


@pytest.fixture(scope="module")
def zoo():
    with modules_of(ZOO, MODULES) as found:
        yield found


@pytest.mark.parametrize("low", [False, True])
def test_partners_are_ranked_and_measured(zoo, low, tmp_path, monkeypatch):
    """Every candidate has one place, its merge is the one that is named, and a second run adds nothing."""
    group = zoo.recipes.Group("mlp", "digits", 22, 12, 1, steps=40)
    monkeypatch.setattr(zoo.ranking, "FULL", () if low else (group,))
    monkeypatch.setattr(zoo.ranking, "LOW", (group,) if low else ())
    monkeypatch.setattr(zoo.ranking, "CANDIDATES", 4)
    monkeypatch.setattr(zoo.ranking, "ASKED", 1)
    monkeypatch.setattr(zoo.ranking, "LENGTH", 10)
    assert zoo.ranking.run(tmp_path, tmp_path / "cache", modes=("inputs", "trial")) == 1
    assert zoo.ranking.run(tmp_path, tmp_path / "cache", modes=("inputs", "trial")) == 0
    rows = zoo.pairs_table.read(tmp_path / "ranking.csv")
    assert len({r["candidate"] for r in rows}) == len(rows) == 4
    for mode in ("inputs", "trial"):
        assert sorted(int(r[f"{mode}_place"]) for r in rows) == [1, 2, 3, 4]
        by = sorted(rows, key=lambda r: int(r[f"{mode}_place"]))
        known = [float(r[f"{mode}_beyond"]) for r in by if r[f"{mode}_trusted"] == "1"]
        assert known == sorted(known)
    model, candidates = next(zoo.ranking.work())
    assert isinstance(candidates[0], zoo.wider.LowRank) == low
    a, b = (zoo.training.load(m, tmp_path / "cache") for m in (model, candidates[0]))
    with torch.no_grad():
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            p.copy_((p + q) / 2)
        held = zoo.tasks.test("digits", (model.task, model.task))
        loss = torch.nn.functional.cross_entropy(a(held.x), held.labels).item()
    assert float(rows[0]["loss_direct"]) == pytest.approx(loss, rel=1e-4)
    zoo.ranking_report.write(tmp_path)
    assert "within 0.01 nats" in (tmp_path / "ranking.md").read_text(encoding="utf-8")


def row(place: int, loss: float, candidate: float, score: float) -> dict[str, str]:
    return {
        "loss_model": "0.5",
        "loss_candidate": str(candidate),
        "loss_direct": str(loss),
        "inputs_place": str(place),
        "inputs_loss": str(loss),
        "inputs_score": str(score),
        "inputs_expected": str(max(0.0, score)),
    }


def test_what_a_choice_costs(zoo):
    """By the merged network the second candidate is best; against the mean of the two the third, which is bad."""
    report, own = zoo.ranking_report, [row(1, 0.52, 0.5, 0), row(2, 0.5, 0.5, 1), row(3, 0.9, 2.5, -1)]
    by, rank = report.choosers(own), "mergeid rank, inputs"
    before = "least loss against the mean of the two (rank before)"
    assert report.regret(own, report.MERGED, *by[rank]) == pytest.approx(0.02)
    assert report.regret(own, report.MERGED, *by[before]) == pytest.approx(0.4)
    bad = [{**own[0], "loss_candidate": "4.5"}, *own[1:]]
    assert report.regret(bad, report.MERGED, *by[report.KNOWN]) == 0
    assert report.regret(own, report.ABOVE, *by[rank]) == pytest.approx(0.02)
    assert report.regret(own, report.ABOVE, *by[before]) == 0
    assert report.by_chance(own, report.MERGED)[0] == pytest.approx(1 / 3)


def test_the_shipped_table_is_what_the_script_makes(zoo):
    """Bases, models and candidates of the table are those of the script; half of the bases have adapters."""
    rows = zoo.pairs_table.read(ZOO / "ranking.csv")
    work = {(m.group.name, m.role): {c.role for c in candidates} for m, candidates in zoo.ranking.work()}
    found = {k: {r["candidate"] for r in own} for k, own in zoo.ranking_report.cases(rows).items()}
    assert found and all(work[k] == own for k, own in found.items())
    assert len(zoo.ranking.FULL) == len(zoo.ranking.LOW) and len({base for base, _ in work}) >= 10
    for r in rows:
        assert 1 <= int(r["inputs_place"]) <= len(found[r["base"], r["model"]])
