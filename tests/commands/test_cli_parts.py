"""Parts of the command line by themselves: abbreviations of axes, the spelling of --json, weights, JSON."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest

from mergeid.commands import graph as graph_command
from mergeid.commands import work as work_module
from mergeid.commands.arguments import parse_weights
from mergeid.commands.work import Work, to_text
from mergeid.errors import MergeidError
from mergeid.neuron_graph import AxisMap, NeuronGraph, Space
from mergeid.reporting.show_graph import alike, ending, pattern, places
from mergeid.reporting.show_plan import fixed, interval

OPTIONS = SimpleNamespace(
    params=[
        SimpleNamespace(opts=["--arch"], is_flag=False),
        SimpleNamespace(opts=["-o", "--output"], is_flag=False),
        SimpleNamespace(opts=["--json"], is_flag=False),
        SimpleNamespace(opts=["--all"], is_flag=True),
        SimpleNamespace(opts=["model"]),
    ]
)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("m --json", "m --json=-"),
        ("m --json f", "m --json=f"),
        ("m --json -", "m --json=-"),
        ("--json m", "--json=- m"),
        ("--json f m", "--json=f m"),
        ("m --json --all", "m --json=- --all"),
        ("--json --arch x m", "--json=- --arch x m"),
        ("--json m --arch x", "--json=- m --arch x"),
        ("--json f m --arch x", "--json=f m --arch x"),
        ("m --json -o f", "m --json=- -o f"),
        ("m --json=f", "m --json=f"),
        ("m --all", "m --all"),
        ("-- --json", "-- --json"),
    ],
)
def test_json_alone_or_with_a_file(words: str, meant: str) -> None:
    assert graph_command.spell_out_json(words.split(), OPTIONS) == meant.split()


def test_patterns() -> None:
    assert pattern("blocks.3.attn.qkv.weight") == "blocks.*.attn.qkv.weight"
    assert pattern("layer1.0.downsample.1.bias") == "layer1.*.downsample.*.bias"
    assert pattern("h.10 MLP hidden") == "h.* MLP hidden"
    assert pattern("conv1.weight") == "conv1.weight"


def test_places() -> None:
    axes = [("l.0.fc.bias", 0), ("l.0.fc.weight", 0), ("l.1.fc.weight", 0), ("l.1.fc.bias", 0), ("out", 1)]
    assert places(axes) == ["l.*.fc.{bias,weight}[0]", "out[1]"]
    shapes = {"bn.a": (3,), "bn.b": (3,), "bn.c": (3,), "w": (3, 3)}
    assert places([("bn.a", 0), ("bn.b", 0), ("bn.c", 0), ("w", 0)], shapes) == ["w[0]", "bn.*[0]"]
    assert places([("bn.a", 0), ("bn.b", 0), ("w", 1)], shapes) == ["w[1]", "bn.{a,b}[0]"]


def test_ending_keeps_what_tells_names_apart() -> None:
    assert ending("a.b.c.weight[0]", 30) == "a.b.c.weight[0]"
    assert ending("encoder.layer.attention.query.weight[0]", 24) == "…query.weight[0]"


def _space(name: str, tensor: str, size: int, parents: tuple[str, ...] = ()) -> Space:
    axes = (AxisMap(tensor, 0, np.arange(size)),)
    return Space(name, tensor, size, 1, parents, np.zeros((1, len(parents)), np.int64), axes)


def test_like_spaces_share_a_row() -> None:
    sizes = {"l.0.w": 4, "l.1.w": 4, "l.2.w": 8, "end.w": 4}
    spaces = [_space(f"s{i}", tensor, size) for i, (tensor, size) in enumerate(sizes.items())]
    graph = NeuronGraph("m", {t: (n,) for t, n in sizes.items()}, spaces, [("end.w", 0, "output")])
    assert [[s.id for s in row] for row in alike(graph)] == [["s0", "s1"], ["s2"], ["s3"]]


def test_explain() -> None:
    space = Space("s0", "hidden", 2, 1, (), np.zeros((1, 0), np.int64), (AxisMap("w", 1, np.array([0, 1, -1])),))
    graph = NeuronGraph("m", {"w": (5, 3)}, [space], [("w", 1, "picked by index")])
    answer = graph_command.explain(graph, "w[1]")
    assert [s["positions"] for s in answer["spaces"]] == [2] and answer["frozen"] == "picked by index"
    assert "1 of 3 positions are frozen (picked by index)" in answer["text"][1]
    assert graph_command.explain(graph, "w[0]")["text"] == ["w[0] has no position that can be permuted."]


@pytest.mark.parametrize(
    ("axis", "says"), [("w", "TENSOR"), ("w[x]", "TENSOR"), ("v[0]", "no tensor 'v'"), ("w[2]", "below 2")]
)
def test_explain_refuses(axis: str, says: str) -> None:
    graph = NeuronGraph("m", {"w": (5, 3)}, [], [])
    with pytest.raises(MergeidError, match=says):
        graph_command.explain(graph, axis)


def test_weights() -> None:
    assert parse_weights("0.25, 0.75") == (0.25, 0.75)
    assert parse_weights("-1,2") == (-1.0, 2.0)
    for text in ("", "a,b", "0.5;0.5"):
        with pytest.raises(MergeidError, match="--weights"):
            parse_weights(text)


def test_json_has_no_nan() -> None:
    value = {"a": [float("nan"), float("inf"), 1.5], 2: {"b": (True, None)}}
    assert json.loads(to_text(value)) == {"a": [None, None, 1.5], "2": {"b": [True, None]}}


def test_numbers_of_a_plan() -> None:
    assert (fixed(-0.001), fixed(0.126), fixed(None)) == ("0.00", "0.13", "–")
    assert interval(-0.001, 0.6) == "0.00 to 0.60"
    assert interval(None, None) == "–"


def test_progress_says_how_long_it_takes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At the pace since the stage began; a stage that goes on at a half is not taken for twice as fast."""
    clock = iter([0.0, 10.0, 20.0, 110.0, 110.0, 3800.0])
    monkeypatch.setattr(work_module.time, "monotonic", lambda: next(clock))
    work = Work(io.StringIO(), False)
    for stage, done in (("writing", 50), ("writing", 60), ("writing", 75), ("looking", 0), ("looking", 10)):
        work.progress(stage, done, 100)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "mergeid: writing: 50 %",
        "mergeid: writing (40 s left): 60 %",
        "mergeid: writing (2 min left): 75 %",
        "mergeid: looking (9 h 14 min left): 10 %",
    ]
