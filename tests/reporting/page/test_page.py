"""The page of a pair: whole, escaped, asking for nothing from elsewhere, and true to what was measured."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pages import curve, report

from mergeid.errors import MergeidError
from mergeid.prediction.model import Interval
from mergeid.reporting.page import Measured, Report, render, report_of
from mergeid.reporting.page.chart import loss_chart, nice, ranges
from mergeid.reporting.page.network import draw, rows_of
from mergeid.reporting.page.verdict import merges, sentence
from mergeid.reporting.show_merge import repair_line
from mergeid.reporting.terms import TERMS, explain
from mergeid.results.merge import MergeResult
from mergeid.results.prediction import Outlook, PredictResult

HOSTILE = '"><script>alert(1)</script>&\x1b[31m'
VOID = {"meta", "input", "br", "path"}


class Tree(HTMLParser):
    """Checks that every element is closed, and gathers what a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.scripts = 0
        self.ids: list[str] = []
        self.headings: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.scripts += tag == "script"
        self.headings += [tag] if re.fullmatch("h[1-6]", tag) else []
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data") and not (value or "").startswith("#"):
                self.fetched.append(f"{tag} {name}={value}")
            if name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def parsed(page: str) -> Tree:
    tree = Tree()
    tree.feed(page)
    assert not tree.open
    return tree


def test_page_is_whole_and_asks_for_nothing() -> None:
    page = render(report())
    tree = parsed(page)
    assert tree.fetched == [] and tree.scripts == 1
    assert len(set(tree.ids)) == len(tree.ids)
    assert tree.headings[0] == "h1" and tree.headings.count("h1") == 1
    assert "url(" not in page and "@import" not in page and "http" not in page.replace("http-equiv", "")
    assert page == render(report())


def test_hostile_names_are_text() -> None:
    given = report()
    assert given.plan is not None
    spaces = [replace(s, label=HOSTILE, why=HOSTILE) for s in given.plan.spaces]
    curves = tuple(replace(c, label=HOSTILE) for c in given.curves)
    bad = replace(
        given, a=HOSTILE, arch=HOSTILE, data=HOSTILE, command=HOSTILE, notes=(HOSTILE,), curves=curves, refused=HOSTILE,
        plan=replace(given.plan, spaces=spaces), solved=(Measured(HOSTILE, 0.1, 0.9),), versions={HOSTILE: HOSTILE},
    )  # fmt: skip
    page = render(bad)
    assert parsed(page).scripts == 1 and "<script>alert" not in page and "\x1b" not in page


def test_parts_that_are_not_there_leave_no_trace() -> None:
    given = report()
    nothing = {"curves": (), "solved": (), "prediction": None, "plan": None, "inputs": (), "versions": {}}
    for name in nothing:
        parsed(render(replace(given, **{name: nothing[name]})))
    page = render(replace(given, **nothing))  # type: ignore[arg-type]
    assert "From A to B" not in page and "Predicted" not in page and "block by block" not in page


def test_page_of_each_kind_of_result() -> None:
    given = report()
    assert given.plan is not None and given.prediction is not None
    look = {"planned": "mixed", "chosen": "matched", "repair": "bn", "distance": 0.02, "unit": "nats", "examples": 64}
    look["distances"] = {"plain": 2.5, "matched+bn": 0.02, "matched": None}
    merged = MergeResult("match", [Path(__file__)], [given.plan], comparison=look)
    pages = {
        "Put B": report_of(given.plan, ["a", "b"]),
        given.prediction.advice[:10]: report_of(given.prediction, ["a", "b"]),
        "From A to B": report_of(given.curves[0], ["a", "b"]),
        "solved, loss": report_of(replace(given.curves[2], beside=given.curves[:2]), ["a", "b"]),
        "The models were merged after putting": report_of(merged, ["a", "b"]),
    }
    for said, each in pages.items():
        page = render(each)
        parsed(page)
        assert said in page
    assert "<em>chosen</em>" in page and page.count("not finite") == 1


@pytest.mark.parametrize("kind", ["solve", "solve+lean", "solve+polish", "regmean", "bn", "repair", "repair+bn"])
def test_page_of_a_merge_says_what_was_done_to_its_weights(kind: str) -> None:
    """As the terminal does, and whether they are still averages."""
    repair = {"kind": kind, "layers": 29, "examples": 256, "error_before": 0.28, "error_after": 0.07}
    repair |= {"spread_before": 0.6, "spread_after": 0.99, "leans_to": "b.safetensors" if "lean" in kind else None}
    if kind == "solve+polish":
        repair |= {"distance_before": 0.125, "distance_after": 0.0625}
    page = render(report_of(MergeResult("match", [Path(__file__)], repair=repair), ["a", "b"]))
    parsed(page)
    text = html.unescape(page)
    assert repair_line(repair) in text and "29" in repair_line(repair)
    fitted = kind.startswith("solve") or kind == "regmean"
    assert ("Test the merged network on other inputs" in text) == fitted
    assert ("then 29 layers of the average were refitted" in text) == fitted
    assert "repaired-title" not in render(report_of(MergeResult("match", [Path(__file__)]), ["a", "b"]))


def test_curves_are_drawn_where_they_were_measured() -> None:
    chart = loss_chart(report().curves, report().solved)
    for line, measured in zip(chart.lines, report().curves, strict=True):
        assert [p[2] for p in line.points] == list(measured.lambdas)
        assert [p[3] for p in line.points] == list(measured.losses)
        places = np.array([p[1] for p in line.points])
        assert (np.diff(places) * np.diff(measured.losses) <= 0).all()  # higher loss, nearer to the top
        assert ((places >= 0) & (places <= 100)).all()
    broken = loss_chart((curve("direct", 0.1, float("nan"), float("inf"), 0.2, 0.1),), ())
    assert len(broken.lines[0].points) == 3 and "not finite" in broken.alt


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.03, 0.031), (0, 1e6), (-3, 7), (12.2, 14.6)])
def test_ticks_are_round(low: float, high: float) -> None:
    ticks = nice(low, high)
    assert 2 <= len(ticks) <= 6
    assert all(low - 1e-9 <= t <= high + 1e-9 and len(f"{t:g}") <= 7 for t in ticks)


def test_verdict_follows_the_measured_loss() -> None:
    assert "solve the layers" in sentence(report())[1] and len(merges(report())) == 3
    given = replace(report(), solved=(), curves=report().curves[:2])
    assert sentence(given)[0] == "yes" and "match their neurons" in sentence(given)[1]
    at_a_price = replace(given, curves=(given.curves[0], curve("matched", 0.1, 0.2, 0.3, 0.2, 0.12)))
    assert sentence(at_a_price)[0] == "care"
    assert sentence(replace(given, curves=given.curves[:1]))[0] == "no"
    nothing = replace(given, curves=(), plan=None, prediction=None, refused="they have nothing in common")
    assert sentence(nothing) == ("no", "These two models will not merge: they have nothing in common.")


def test_a_curve_alone_damns_no_other_way() -> None:
    alone = Report("a", "b", curves=(curve("direct", 0.1, 0.6, 1.3, 0.6, 0.12),))
    assert sentence(alone)[0] == "care" and sentence(alone)[1].startswith("Not in this way (direct): ")
    assert "They do not merge" not in render(alone)


def test_an_open_interval_has_no_end_on_the_page() -> None:
    """What was measured beyond it is inside of it, and lies on it."""
    open_one = Interval(1.7, 0.7, 2.3, 0.0, 0.0, 0.0, False, True)
    closed = Interval(0.4, 0.1, 1.0, 0.0, 0.0, 0.0)
    ways = [Outlook(name, False, nats, None, []) for name, nats in (("direct", open_one), ("matched", closed))]
    predicted = PredictResult("a", "b", "x", "inputs", 64, 0.01, ways, None, "1")
    told, _ = ranges(predicted, (curve("direct", 0, 2, 4, 2, 0),))
    assert told[0].inside and told[0].low < told[0].measured < told[0].high == 100 and told[0].open
    assert not told[1].open and told[1].high < 100


@pytest.mark.parametrize("middle", [0.3, 1.0])
def test_models_whose_own_statistics_fit_badly_make_no_merge_good(middle: float) -> None:
    """Inputs prepared in another way than in training: next to models at chance, any re-estimated merge looks good."""
    as_is = curve("direct", 3.0, 2.9, 2.9, 2.8, 2.6)
    repaired = curve("matched, repaired", 0.1, 0.2, middle, 0.2, 0.12, repair=True)
    verdict, said = sentence(replace(report(), solved=(), curves=(as_is, repaired)))
    assert verdict == "care" and "seem to be off" in said and "10.0" in said and "95.0" in said
    assert sentence(replace(report(), solved=(), curves=(repaired, as_is)))[0] == "care"


def test_every_space_is_drawn_once() -> None:
    given = report()
    assert given.plan is not None
    drawn = draw(given.plan)
    found = [d.space.id for row in drawn.rows for d in row.spaces] + [d.space.id for d in drawn.streams]
    assert sorted(found) == sorted(s.id for s in given.plan.spaces)
    many = [f"layers.{i}.mlp.experts.{e}.w.weight" for i in range(40) for e in range(16)]
    assert set(rows_of([*many, "head.weight"]).values()) == {*(f"layers.{i}" for i in range(40)), "head"}
    assert rows_of(["stem.0.weight", "stem.1.weight", "b.0.down.0.weight", "b.0.conv.weight"]) == {
        "stem.0.weight": "stem", "stem.1.weight": "stem", "b.0.down.0.weight": "b.0", "b.0.conv.weight": "b.0",
    }  # fmt: skip


def test_size_of_a_large_network() -> None:
    """600 spaces, more than twice those of a ResNet-152 or a Llama of 80 layers."""
    given = report()
    assert given.plan is not None
    spaces = [replace(given.plan.spaces[0], id=f"s{i}", label=f"layers.{i}.mlp hidden") for i in range(600)]
    shape = [SimpleNamespace(id=s.id, axes=[SimpleNamespace(tensor=f"layers.{i}.w")]) for i, s in enumerate(spaces)]
    graph = SimpleNamespace(tensors={f"layers.{i}.w": (1,) for i in range(600)}, spaces=shape, verified=None)
    page = render(replace(given, plan=replace(given.plan, spaces=spaces, graph=graph)))  # type: ignore[arg-type]
    assert len(page.encode()) <= 1_500_000


def test_terms() -> None:
    for term in TERMS:
        assert explain(term.name.upper()) is term and all(explain(word) is term for word in term.also)
        assert term.meaning.endswith(".") and max(len(s.split()) for s in term.meaning.split(". ")) <= 30
    names = [w.casefold() for t in TERMS for w in (t.name, *t.also)]
    assert len(set(names)) == len(names)
    with pytest.raises(MergeidError, match="did you mean barrier"):
        explain("barier")
