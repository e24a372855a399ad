"""Whatever is malformed, hostile or odd: one short sentence, exit code 2, nothing written and nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Done, files_in
from safetensors.torch import save_file

import mergeid
from mergeid.basics import stopping
from mergeid.basics.reading import json_text, parse_json, read_json, read_yaml_documents
from mergeid.commands.cli import run
from mergeid.errors import MergeidError, MergeidWarning, listed, plain, shown

Inside = Callable[..., Done]
PLAIN = ("--match", "never")
ESCAPE = "\x1b[31mX\u202e\x9b"


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Inside:
    """The command without a process of its own; works in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*words: object) -> Done:
        there = files_in(tmp_path)
        code = run([str(word) for word in words])
        stdout, stderr = capsys.readouterr()
        after = files_in(tmp_path)
        return Done(code, stdout, stderr, [n for n in {*after, *there} if after.get(n) != there.get(n)])

    return call


def refused(done: Done, *parts: str) -> None:
    """One clean, short sentence that says `parts`; nothing written or changed."""
    assert done.code == 2 and done.stdout == "", (done.code, done.stdout, done.stderr)
    assert len(done.lines) == 1 and done.lines[0].startswith("mergeid: error: ") and len(done.stderr) < 1200, (
        done.stderr
    )
    assert not any(c in done.stderr for c in "\x1b\x9b\u202e\0")
    for part in parts:
        assert part in done.lines[0], (part, done.lines[0])
    assert done.written == []


def raw(path: Path, entries: dict[str, Any], data: bytes) -> Path:
    """A safetensors file that says whatever it is told to."""
    text = json.dumps(entries).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def one(path: Path, name: str = "w", dtype: str = "F32", shape: object = (1,), end: object = 4) -> Path:
    return raw(path, {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}, b"\0\0\x80\x3f")


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """a.safetensors and b.safetensors with one number each."""
    for name in "ab":
        one(tmp_path / f"{name}.safetensors")
    return tmp_path


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small BERT classifiers in a/ and b/, and d.npz with examples."""
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("networks")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = BertConfig(vocab_size=40, max_position_embeddings=32, num_labels=3, **sizes)
        BertForSequenceClassification(config).save_pretrained(folder / name)
    np.savez(folder / "d.npz", input_ids=np.arange(320).reshape(32, 10) % 40, labels=np.arange(32) % 3)
    return folder


# --- messages ----------------------------------------------------------------------------------------------------


def test_a_message_is_clean_short_and_on_one_line_however_it_is_made() -> None:
    text = f"tensor {ESCAPE}\n\n{'x' * 10_000} \ud800 {'word ' * 5000}"
    for made in (str(MergeidError(text)), str(MergeidWarning(text)), plain(text)):
        assert made.isprintable() and len(made) <= 1000 and "\\x1b[31mX\\u202e\\x9b" in made and "\\ud800" in made
        made.encode("utf-8")
    fine = "tensor 'layer1.0.conv1.weight' of a/model.safetensors holds NaN; λ = 0.5 …"
    assert plain(fine) == fine == str(MergeidError(fine))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("text", "'text'"), (3, "3"), (10**50, "a number of more than 40 digits"), (True, "true"), (None, "empty"),
        ([], "an empty list"), ([[1] * 9] * 9, "a list of 9"), ({"a": 1, "b": 2}, "a table of 2 entries"),
        (object(), "of type object"), (float("nan"), "nan"),
    ],
)  # fmt: skip
def test_values_from_outside_are_quoted_by_kind(value: object, said: str) -> None:
    assert shown(value) == said
    assert len(shown("x" * 10**6)) < 120 and "40 digits" in shown(10**5000)


def test_many_names_are_not_all_listed() -> None:
    assert listed("abc") == "a, b, c" and listed(range(20), 3) == "0, 1, 2 and 17 more"


def test_names_from_files_are_cleaned_in_tables_and_json(inside: Inside, pair: Path) -> None:
    torch.manual_seed(0)  # with other weights no neuron may be awake
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    graph = mergeid.graph(model, torch.ones(2, 2)).to_json()
    graph["spaces"][0]["label"] = ESCAPE
    from io import StringIO

    from mergeid.commands.work import Work
    from mergeid.neuron_graph import NeuronGraph
    from mergeid.reporting.show_graph import print_graph

    found = NeuronGraph.from_json(graph)
    out = StringIO()
    print_graph(found, Work(out, False).console, every=True)
    assert "\\x1b[31m" in out.getvalue() and not {"\x1b", "\u202e", "\x9b"} & set(out.getvalue())
    text = json_text(graph)
    assert json.loads(text) == graph and "\u202e" not in text and "\x9b" not in text


@pytest.mark.parametrize(
    "entries",
    [
        {ESCAPE: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        {"w": {"dtype": ESCAPE, "shape": [1], "data_offsets": [0, 4]}},
        {"x" * 200_000: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
    ],
    ids=["name", "dtype", "long name"],
)
def test_what_a_file_says_does_not_reach_the_terminal(inside: Inside, pair: Path, entries: dict[str, Any]) -> None:
    raw(pair / "odd.safetensors", entries, b"\0\0\0\0")
    refused(inside("merge", "odd.safetensors", "b.safetensors", *PLAIN))
    refused(inside("merge", "b.safetensors", "odd.safetensors", *PLAIN, "--method", "slerp"))


# --- the door for small files ------------------------------------------------------------------------------------

DEEP = {"lists": "[" * 100_000, "tables": '{"weight_map":' * 50_000, "just too deep": "[" * 66 + "]" * 66}


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_nests_too_deep(inside: Inside, tmp_path: Path, name: str, text: str) -> None:
    for folder in "ab":
        one(tmp_path / folder / "model.safetensors")
    (tmp_path / "a" / name).write_text(text)
    if name.endswith("index.json"):
        (tmp_path / "a" / "model.safetensors").unlink()
    refused(inside("merge", "a", "b", *PLAIN, "-o", "out"), f"a/{name}", "nests more than 64")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 2}', "the name 'a' occurs twice"), ("NaN", "NaN is not a number"), ("1" * 5000, "digits"),
        ("1" * 400, "digits"), ("[1,", "line 1"), ('"\\ud800', "line 1"), ("", "line 1"),
    ],
)  # fmt: skip
def test_json_of_our_own_is_strict(text: str, said: str) -> None:
    with pytest.raises(MergeidError, match=said):
        parse_json(text, "graph.json", own=True)


def test_json_of_others_may_say_what_python_writes() -> None:
    assert parse_json('{"a": 1, "a": [Infinity, NaN]}', "config.json")["a"][0] == float("inf")
    assert parse_json('{"model_max_length": 1000000000000000019884624838656}', "config.json")


def test_a_file_that_is_too_large_or_no_text(tmp_path: Path) -> None:
    (tmp_path / "f.json").write_bytes(b"\xff{}")
    with pytest.raises(MergeidError, match=r"f\.json cannot be read as text \(byte 0"):
        read_json(tmp_path / "f.json")
    (tmp_path / "r.yaml").write_text("#" * 300_000)
    with pytest.raises(MergeidError, match=r"300,000 bytes, more than the 262,144 allowed"):
        read_yaml_documents(tmp_path / "r.yaml", "a recipe")
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf{}")
    assert read_json(tmp_path / "bom.json") == {}


BOMB = "  - &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"  - &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
MERGED = "m0: &m0 {a: 1, b: 2}\n" + "".join(
    f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}\n" for i in range(1, 10)
)


@pytest.mark.parametrize("key", ["base_model", "dtype", "parameters", "models"])
def test_aliases_that_multiply(inside: Inside, pair: Path, key: str) -> None:
    (pair / "r.yaml").write_text(f"merge_method: linear\n{key}:\n{BOMB}")
    refused(inside("merge", "r.yaml"), "r.yaml has more than 100,000 values")
    (pair / "r.yaml").write_text(MERGED)
    refused(inside("merge", "r.yaml"), "r.yaml has more than 100,000 values")


@pytest.mark.parametrize(
    "text",
    ["2026-99-99", "!!int x", "!!int ''", "!!float x", "1" * 5000, "!!bool x", "!!timestamp x", "!!binary x", "&a [*a]",
     "*nobody", "=", "!!set {a}", "{[a]: b}", "1" * 400, "!!python/name:os.system", "[" * 20_000, "{a: " * 5000,
     "\x1b[31m", "a\0b", "\"\\ud800\"", "{x: 1, x: 2}", "---\n- another document"],
    ids=lambda text: repr(text)[:20],
)  # fmt: skip
def test_values_that_yaml_cannot_make(inside: Inside, pair: Path, text: str) -> None:
    (pair / "r.yaml").write_text(f"merge_method: linear\nmodels: [{{model: a}}, {{model: b}}]\ndtype: {text}\n")
    refused(inside("merge", "r.yaml", *PLAIN, "-o", "out"))


def test_aliases_that_are_harmless(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("a: &m {x: 1, y: 2}\nb: {<<: *m, x: 3}\nc: [*m, *m]\nd: 2001-01-01\n")
    (found,) = read_yaml_documents(tmp_path / "r.yaml", "a recipe")
    assert found == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": [{"x": 1, "y": 2}] * 2, "d": "2001-01-01"}


# --- safetensors and pickles -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [2**63]}, {"shape": [2**64, 0]}, {"shape": [2**62, 2**62, 0], "end": 0}, {"shape": [-1]},
        {"shape": ["1"]}, {"shape": [1.0]}, {"shape": [True]}, {"shape": 1}, {"shape": [1] * 65}, {"end": 2**63},
        {"end": 10**30}, {"end": "4"}, {"name": "\ud800"}, {"dtype": 5}, {"dtype": []}, {"shape": None},
    ],
    ids=repr,
)  # fmt: skip
def test_headers_that_lie(inside: Inside, pair: Path, entry: dict[str, Any]) -> None:
    one(pair / "odd.safetensors", **entry)
    refused(inside("merge", "odd.safetensors", "b.safetensors", *PLAIN), "odd.safetensors")


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch PWNED",)


PICKLED: dict[str, Callable[[], Any]] = {
    "sparse": lambda: {"w": torch.eye(3).to_sparse()},
    "meta": lambda: {"w": torch.zeros(3, device="meta")},
    "csr": lambda: {"w": torch.eye(3).to_sparse_csr()},
    "expanded": lambda: {"w": torch.zeros(1).expand(10**7)},
    "quantised": lambda: {"w": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)},
    "name": lambda: {"\ud800": torch.zeros(3)},
    "module": lambda: torch.nn.Linear(2, 2),
    "code": lambda: {"w": _Evil()},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", PICKLED)
def test_pickles_of_odd_tensors(inside: Inside, tmp_path: Path, kind: str) -> None:
    torch.save(PICKLED[kind](), tmp_path / "x.bin")
    refused(inside("merge", "x.bin", "x.bin", *PLAIN, "--allow-pickle", "-o", "o.safetensors"), "x.bin")
    assert not (tmp_path / "PWNED").exists()


# --- configs -----------------------------------------------------------------------------------------------------

CONFIG = {
    "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32,
}  # fmt: skip
LIES: list[tuple[str, Any]] = [
    ("hidden_size", "16"), ("hidden_size", -1), ("hidden_act", "nope"), ("hidden_act", 5), ("num_attention_heads", 0),
    ("num_attention_heads", 3), ("vocab_size", 10**13), ("vocab_size", 2**70), ("num_hidden_layers", 10**9),
    ("max_position_embeddings", 10**12), ("intermediate_size", 10**11), ("model_type", 5), ("model_type", "\ud800"),
    ("architectures", [ESCAPE]), ("num_hidden_layers", None), ("layer_norm_eps", "x" * 10**5),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), LIES, ids=lambda v: repr(v)[:20])
def test_configs_that_cannot_be(inside: Inside, tmp_path: Path, key: str, value: Any) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(json.dumps({**CONFIG, key: value}))
    refused(inside("graph", "a/config.json"))


@pytest.mark.parametrize(("key", "value"), [("id2label", 5), ("architectures", 5), ("nobody_knows_this", [{}])])
def test_config_fields_that_do_not_matter(tmp_path: Path, key: str, value: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, key: value}))
    try:
        assert mergeid.graph(tmp_path / "config.json").spaces
    except MergeidError as error:
        assert key in ("id2label", "architectures") and "config" in str(error)


def test_a_config_of_another_size_than_its_file(inside: Inside, networks: Path, tmp_path: Path) -> None:
    """Nothing is asked of memory for what the file does not hold."""
    shutil.copytree(networks / "a", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "vocab_size": 10**10}))
    refused(inside("graph", "a"), "the checkpoint holds", "expected the config of this model")


# --- our own formats ---------------------------------------------------------------------------------------------

GRAPH: dict[str, Any] = {
    "format": "mergeid.graph/1",
    "tensors": {"w": {"shape": [4]}},
    "spaces": [{"id": "s", "size": 4, "axes": [{"tensor": "w", "axis": 0, "index": [[0, i] for i in range(4)]}]}],
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spaces": [{**GRAPH["spaces"][0], "colour": 1}]}, "spaces[0] has an unknown key 'colour'"),
        ({"tensor": {}}, "has an unknown key 'tensor' (did you mean 'tensors'?)"),
        ({"spaces": 5}, "spaces is 5; expected a list"),
        ({"spaces": [5]}, "spaces[0] is 5; expected a table with id"),
        ({"spaces": [{**GRAPH["spaces"][0], "size": "4"}]}, "spaces[0].size is '4'; expected a whole number"),
        ({"spaces": [{**GRAPH["spaces"][0], "size": 2**40}]}, "spaces[0].size"),
        ({"spaces": [{**GRAPH["spaces"][0], "size": 10**9}]}, "1,000,000,000 neurons"),
        ({"spaces": [{**GRAPH["spaces"][0], "size": 0}]}, "spaces[0].size is 0"),
        ({"tensors": {"w": {"shape": [2**63]}}}, "tensors.w.shape[0]"),
        ({"tensors": {"w": {"shape": [4.0]}}}, "tensors.w.shape[0] is 4.0; expected a whole number"),
        ({"share": float("nan")}, "share is nan; expected a finite number"),
        ({"format": ESCAPE}, "has format"),
        ({"format": ["x"] * 10**5}, "has format a list of 100000"),
        ({"spaces": [{**GRAPH["spaces"][0], "parents": ["s"] * 3}]}, "needs block_parents"),
        ({"spaces": [{**GRAPH["spaces"][0], "block_parents": [[0]]}]}, "expected one row of block_parents"),
    ],
)
def test_graphs_that_are_none(change: dict[str, Any], said: str) -> None:
    from mergeid.neuron_graph import NeuronGraph

    with pytest.raises(MergeidError) as raised:
        NeuronGraph.from_json({**GRAPH, **change})
    assert said in str(raised.value) and len(str(raised.value)) < 600


@pytest.fixture(scope="module")
def sketched(networks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sketched") / "a.sketch"
    mergeid.sketch(networks / "a", data=networks / "d.npz", output=path)
    return path


def _changed(sketch: Path, place: Path, about: dict[str, str | None], tensors: dict[str, torch.Tensor | None]) -> Path:
    from safetensors import safe_open

    with safe_open(str(sketch), "pt") as file:
        names = list(file.keys())
        kept: dict[str, Any] = {**{n: file.get_tensor(n) for n in names}, **tensors}
        said: dict[str, Any] = {**file.metadata(), **about}
    save_file({k: v for k, v in kept.items() if v is not None}, place, {k: v for k, v in said.items() if v is not None})
    return place


@pytest.mark.parametrize(
    ("about", "tensors"),
    [
        ({"spaces": "[" * 100_000}, {}), ({"spaces": "5"}, {}), ({"spaces": '[{"id": 5}]'}, {}), ({"names": "{}"}, {}),
        ({"names": None}, {}), ({"repairable": "1"}, {}), ({"more": "1"}, {}), ({"spaces": "[NaN]"}, {}),
        ({}, {"logits": None}), ({}, {"logits": torch.zeros(3)}), ({}, {"hashes": torch.zeros(1, 2)}),
        ({}, {"response": torch.full((9, 2, 2), float("nan"), dtype=torch.float64)}),
        ({}, {"activations.nobody": torch.zeros(4, 4)}), ({}, {"logits": torch.full((4, 3), 3e38)}),
        ({}, {"logits": torch.zeros(0, 3)}),
    ],
    ids=lambda v: ",".join(v) or "-",
)  # fmt: skip
def test_damaged_sketches(
    inside: Inside, sketched: Path, tmp_path: Path, about: dict[str, Any], tensors: dict[str, Any]
) -> None:
    shutil.copy(sketched, tmp_path / "a.sketch")
    _changed(sketched, tmp_path / "b.sketch", about, tensors)
    refused(inside("predict", "a.sketch", "b.sketch"), "b.sketch")


def test_an_untouched_sketch_reads_back(inside: Inside, sketched: Path, tmp_path: Path) -> None:
    shutil.copy(sketched, tmp_path / "a.sketch")
    _changed(sketched, tmp_path / "b.sketch", {}, {})
    done = inside("predict", "a.sketch", "b.sketch", "--json")
    assert done.code == 0, done.stderr


# --- numbers on the command line and in Python -------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("--weights", "1e308,1e308"), ("--weights", "nan,1"), ("--weights", "inf,-inf"), ("--weights", "1e13,1"),
        ("--weights", "1e308,1e308", "--normalize"), ("--seed", 2**63), ("--seed", 2**64), ("--seed", -1),
        ("--seed", "x" * 10**5), ("--limit", 0), ("--limit", -5), ("--batch-size", 0), ("--batch-size", "1e3"),
        ("--method", "task_arithmetic", "--base", "a.safetensors", "--set", "lambda=1e308"),
        ("--method", "task_arithmetic", "--base", "a.safetensors", "--set", f"lambda={'1' * 400}"),
        ("--method", "task_arithmetic", "--base", "a.safetensors", "--set", f"lambda={'1' * 5000}"),
        ("--method", "karcher", "--set", "max_iter=nan"), ("--method", ESCAPE), ("--arch", "x" * 10**5),
        ("--dtype", ESCAPE * 1000), ("-o", "x" * 300 + ".safetensors"), ("-o", ESCAPE + "/o.safetensors"),
    ],
    ids=lambda w: " ".join(map(str, w))[:40],
)  # fmt: skip
def test_values_out_of_range(inside: Inside, pair: Path, words: tuple[object, ...]) -> None:
    always = () if "--arch" in words else PLAIN
    refused(inside("merge", "a.safetensors", "b.safetensors", *always, *words))


@pytest.mark.parametrize(
    "options",
    [{"seed": 2**63}, {"seed": -1}, {"seed": 1.5}, {"seed": "1"}, {"seed": True}, {"limit": 0}, {"batch_size": 0},
     {"batch_size": 2.5}, {"weights": [10**400, 1]}, {"weights": ["a", "b"]}, {"weights": [None, 1]}],
    ids=repr,
)  # fmt: skip
def test_values_out_of_range_in_python(pair: Path, options: dict[str, Any]) -> None:
    output = pair / "o.safetensors"
    with pytest.raises(MergeidError):
        mergeid.merge(pair / "a.safetensors", pair / "b.safetensors", match="never", output=output, **options)
    assert not output.exists()


# --- what is no file ---------------------------------------------------------------------------------------------


@pytest.fixture
def special(pair: Path) -> Iterator[Path]:
    """A named pipe, a socket, a folder and a link to itself, each under several endings."""
    listening = []
    for ending in ("safetensors", "yaml", "json", "npz", "bin", "sketch"):
        os.mkfifo(pair / f"pipe.{ending}")
        (pair / f"folder.{ending}").mkdir()
        (pair / f"loop.{ending}").symlink_to(f"loop.{ending}")
        listening.append(socket.socket(socket.AF_UNIX))
        listening[-1].bind(os.path.relpath(pair / f"socket.{ending}"))
    yield pair
    for each in listening:
        each.close()


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "socket"])
def test_what_is_no_file_is_not_waited_for(inside: Inside, special: Path, networks: Path, kind: str) -> None:
    b, net = "b.safetensors", networks / "a"
    for words in (
        ("merge", f"{kind}.safetensors", b, *PLAIN),
        ("merge", b, f"{kind}.safetensors", *PLAIN),
        ("merge", f"{kind}.bin", b, *PLAIN, "--allow-pickle"),
        ("merge", f"{kind}.yaml", *PLAIN),
        ("merge", b, b, "--method", "ties", "--base", f"{kind}.safetensors", *PLAIN),
        ("graph", f"{kind}.json"),
        ("graph", net, "--from", f"{kind}.json"),
        ("graph", net, "--arch", f"{kind}.json"),
        ("predict", f"{kind}.sketch", f"{kind}.sketch"),
        ("plan", net, net, "--data", f"{kind}.npz"),
    ):  # fmt: skip
        refused(inside(*words))


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket"])
def test_outputs_that_are_no_files(inside: Inside, special: Path, networks: Path, kind: str) -> None:
    a, b = networks / "a", "b.safetensors"
    for words in (
        ("merge", b, b, *PLAIN, "-o", f"{kind}.safetensors", "--force"),
        ("graph", a, "--json", f"{kind}.json"),
        ("plan", a, a, "-o", f"{kind}.json"),
        ("sketch", a, "--data", networks / "d.npz", "-o", f"{kind}.sketch", "--force"),
    ):
        refused(inside(*words), kind)


def test_a_config_that_is_a_pipe(inside: Inside, tmp_path: Path) -> None:
    for folder in "ab":
        one(tmp_path / folder / "model.safetensors")
    os.mkfifo(tmp_path / "a" / "config.json")
    refused(inside("merge", "a", "b", *PLAIN, "-o", "out"), "a/config.json is a named pipe")


def test_characters_that_no_path_can_have(tmp_path: Path) -> None:
    for name in ("a\0b.safetensors", "\ud800.safetensors", "x" * 300 + ".safetensors", "a\0/b"):
        with pytest.raises(MergeidError):
            mergeid.merge(name, name, match="never", output=tmp_path / "o.safetensors")
        with pytest.raises(MergeidError):
            mergeid.graph(name)
        one(tmp_path / "a.safetensors")
        with pytest.raises(MergeidError):
            mergeid.merge(*[tmp_path / "a.safetensors"] * 2, match="never", output=tmp_path / name)


# --- outputs -----------------------------------------------------------------------------------------------------


def test_no_output_touches_an_input(inside: Inside, networks: Path, tmp_path: Path) -> None:
    for name in "ab":
        shutil.copytree(networks / name, tmp_path / name)
    shutil.copy(networks / "d.npz", tmp_path / "d.npz")
    (tmp_path / "link.json").symlink_to(tmp_path / "a" / "config.json")
    os.link(tmp_path / "d.npz", tmp_path / "hard.json")
    (tmp_path / "g.json").write_text("{}")
    (tmp_path / "r.yaml").write_text("merge_method: linear\nmodels: [{model: a}, {model: b}]\n")
    (tmp_path / "a" / "2_Dense").mkdir()
    shutil.copy(tmp_path / "a" / "config.json", tmp_path / "a" / "2_Dense" / "config.json")
    with_data = ("--data", "d.npz")
    for words in (
        ("graph", "a", "--json", "a/config.json"),
        ("graph", "a", "-o", "a/config.json"),
        ("graph", "a", "-o", "link.json"),
        ("graph", "a/model.safetensors", "-o", "a/config.json"),
        ("graph", "a/config.json", "--json", "a/config.json"),
        ("graph", "a", "--arch", "g.json", "-o", "g.json"),
        ("graph", "a", "--from", "g.json", "-o", "g.json"),
        ("plan", "a", "b", "-o", "b/config.json"),
        ("plan", "a", "b", *with_data, "-o", "d.npz"),
        ("plan", "a", "b", *with_data, "-o", "hard.json"),
        ("plan", "a", "b", "--base", "a", "--plot", "a/config.png", "-o", "a/config.json"),
        ("barrier", "a", "b", *with_data, "--resume", "a/config.json"),
        ("barrier", "a", "b", *with_data, "-o", "d.npz"),
        ("barrier", "a", "b", *with_data, "-o", "x.png", "--plot", "x.png"),
        ("similarity", "a", "b", *with_data, "-o", "a/config.json"),
        ("predict", "a", "b", *with_data, "-o", "d.npz"),
        ("merge", "a", "b", *PLAIN, "-o", "a", "--force"),
        ("merge", "a", "b", *PLAIN, "-o", "a/model.safetensors", "--force"),
        ("merge", "a", "b", *PLAIN, "-o", "a/2_Dense", "--force"),
        ("merge", "a", "b", *PLAIN, "-o", ".", "--force"),
        ("merge", "r.yaml", *PLAIN, "-o", "b", "--force"),
        ("scramble", "a", "-o", "a", "--force"),
        ("align", "b", "--to", "a", "-o", "b/model.safetensors", "--force"),
    ):
        refused(
            inside(*words),
            "-" + next(w for w in reversed(words) if w.startswith("-") and w != "--force").strip("-")[:1],
        )


def test_a_recipe_outlives_the_folder_that_it_lies_in(inside: Inside, pair: Path) -> None:
    (pair / "out").mkdir()
    (pair / "out" / "config.json").write_text("{}")
    models = "[{model: a.safetensors}, {model: b.safetensors}]"
    (pair / "out" / "r.yaml").write_text(f"merge_method: linear\nmodels: {models}\n")
    refused(inside("merge", "out/r.yaml", *PLAIN, "-o", "out", "--force"), "out/r.yaml is in it")


PLACES = ("/proc/x", "nowhere/x", "a.safetensors/x", "/dev/null/x")


@pytest.mark.parametrize("place", PLACES)
def test_places_that_cannot_be_written_are_known_before_work(
    inside: Inside, pair: Path, networks: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("work was begun")

    for name in ("models.workbench.open_checkpoint", "models.examples.examples_of"):
        monkeypatch.setattr(f"mergeid.{name}", never)
    a, data = str(networks / "a"), ("--data", networks / "d.npz")
    for words in (
        ("sketch", a, *data, "-o", f"{place}.sketch"),
        ("barrier", a, a, *data, "--plot", f"{place}.png"),
        ("barrier", a, a, *data, "-o", f"{place}.json"),
        ("plan", a, a, "-o", f"{place}.json"),
        ("plan", a, a, "--plot", f"{place}.svg"),
        ("graph", a, "--json", f"{place}.json"),
        ("merge", a, a, *PLAIN, "-o", f"{place}.safetensors"),
        ("scramble", a, "-o", place),
    ):
        refused(inside(*words), Path(place).parent.name)


# --- signals -----------------------------------------------------------------------------------------------------


def test_signals_wait_for_what_belongs_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ended: list[int] = []
    monkeypatch.setattr(stopping, "_pending", None)  # first: what the test leaves pending would end the test run
    monkeypatch.setattr(stopping, "_end", ended.append)
    with stopping.uninterrupted():
        with stopping.uninterrupted():
            stopping._stop(signal.SIGTERM, None)
        assert not ended
    assert ended == [signal.SIGTERM]


HELPER = """
# Imports once, then forks: every child merges until a signal comes. Prints exit codes and what was left.
import json, os, pathlib, random, shutil, signal, sys, time
import torch, numpy
from mergeid.basics import stopping
sys.path.insert(0, sys.argv[5])
from merging import merge_checkpoints

a, b, place, rounds = sys.argv[1:5]
place = pathlib.Path(place)
draw = random.Random(0)
started = time.perf_counter()
merge_checkpoints(a, b, place / "o", weights=(0.3, 0.7), record={})
whole = time.perf_counter() - started
shutil.rmtree(place / "o")
for k in range(int(rounds)):
    number = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)[k % 3]
    output = place / ("o" if k % 2 else "o.safetensors")
    pid = os.fork()
    if not pid:
        signal.signal(number, signal.SIG_DFL)  # whoever runs the tests may ignore it
        stopping.install()
        merge_checkpoints(a, b, output, weights=(0.3, 0.7), record={})
        while True: time.sleep(1)
    while not any(place.iterdir()): time.sleep(0.001)
    time.sleep(draw.uniform(0, 1.2 * whole) if k else 0)
    os.kill(pid, number)
    status = os.waitpid(pid, 0)[1]
    left = sorted(p.name for p in place.iterdir())
    size = sum(p.stat().st_size for p in place.rglob("*.safetensors") if p.is_file())
    print(json.dumps({"code": os.waitstatus_to_exitcode(status), "expected": 128 + number, "left": left, "size": size}))
    for p in place.iterdir(): shutil.rmtree(p) if p.is_dir() else p.unlink()
"""


def test_stopped_while_writing(tmp_path: Path) -> None:
    """By SIGTERM, SIGHUP and Ctrl-C: the whole output or none, and nothing else."""
    size = 0
    for name in "ab":
        save_file({f"w{i}": torch.randn(256, 1024) for i in range(24)}, tmp_path / f"{name}.safetensors")
        size = (tmp_path / f"{name}.safetensors").stat().st_size
    (tmp_path / "place").mkdir()
    (tmp_path / "helper.py").write_text(HELPER)
    words = [str(tmp_path / n) for n in ("helper.py", "a.safetensors", "b.safetensors", "place")]
    helpers = str(Path(__file__).parents[1] / "helpers")
    done = subprocess.run([sys.executable, *words, "12", helpers], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rounds) == 12
    for each in rounds:
        assert each["code"] == each["expected"]
        assert each["left"] in ([], ["mergeid.json", "o.safetensors"], ["o"]), each
        assert not each["left"] or each["size"] == size
    assert any(not each["left"] for each in rounds)


def test_stopped_while_threads_write(tmp_path: Path) -> None:
    """What other threads still put into a temporary folder goes too."""
    code = (
        "import os, pathlib, signal, sys, threading, time\n"
        "from mergeid.basics import stopping\n"
        "signal.signal(signal.SIGTERM, signal.SIG_DFL); stopping.install()\n"
        "folder = stopping.note(pathlib.Path(sys.argv[1])); folder.mkdir()\n"
        "def write(k):\n"
        "    n = 0\n"
        "    while True:\n"
        "        try: (folder / f'{k}-{(n := n + 1)}').write_text('x')\n"
        "        except OSError: time.sleep(0.001)\n"
        "for k in range(3): threading.Thread(target=write, args=(k,), daemon=True).start()\n"
        "time.sleep(0.3); os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
    )
    for k in range(5):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / str(k))], check=False)
        assert done.returncode == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


WORK = {
    "arrays": "kept = Stored(['x'], lambda name: np.zeros(1 << 20)); kept['x']",
    "activations": "kept = Spool(10); kept.put(('tap', 0), *[Rows(torch.ones(3, 2), torch.arange(3))] * 2)",
    "tensors": "torch.from_file = stop; on_disk(torch.ones(3))",
    "beside an output": "kept = TemporaryFolder(pathlib.Path(sys.argv[1]))",
    "stages": "merge_stages([named, last], pathlib.Path(sys.argv[1]) / 'out', stop)",
}


@pytest.mark.parametrize("kind", WORK)
def test_temporary_folders_go_where_the_process_is_stopped(tmp_path: Path, kind: str) -> None:
    program = (
        "import os, pathlib, signal, sys, time\n"
        "import numpy as np, torch\n"
        "from mergeid.basics import stopping\n"
        "from mergeid.basics.on_disk import on_disk\n"
        "from mergeid.basics.when_asked import Stored\n"
        "from mergeid.evidence.activations import Rows\n"
        "from mergeid.evidence.spool import Spool\n"
        "from mergeid.methods.recipe import parse_recipe\n"
        "from mergeid.stages.recipe import merge_stages\n"
        "told = {'merge_method': 'linear', 'models': [{'model': m, 'parameters': {'weight': 1}} for m in 'ab']}\n"
        "named, last = parse_recipe({**told, 'name': 'one'}), parse_recipe(told)\n"
        "def stop(*given, **more):\n"
        "    assert list(pathlib.Path(sys.argv[1]).iterdir())\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_DFL); stopping.install()\n"
        f"TemporaryFolder = getattr(stopping, 'TemporaryFolder', None); {WORK[kind]}\n"
        "stop()\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    words = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert not list(tmp_path.iterdir())


def test_all_temporary_folders_are_of_that_kind() -> None:
    root = Path(stopping.__file__).parents[1]
    assert [p.name for p in root.rglob("*.py") if "import tempfile" in p.read_text()] == ["stopping.py"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_while_importing(tmp_path: Path, number: signal.Signals) -> None:
    """The module that the command imports first is there, the others are on their way."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "mergeid", "merge", "a", "b"], stderr=subprocess.PIPE, text=True,
        cwd=tmp_path, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stderr is not None
    while "mergeid.basics.stopping" not in process.stderr.readline():
        pass
    time.sleep(0.02)
    process.send_signal(number)
    rest = [line for line in process.communicate(timeout=60)[1].splitlines() if not line.startswith("import time:")]
    if process.returncode != 2:  # it may have been done by then
        assert process.returncode == 128 + number and rest == []


def test_a_signal_that_the_caller_ignores_stays_ignored() -> None:
    code = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from mergeid.basics import stopping; stopping.install()\n"
        "assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN\n"
        "assert signal.getsignal(signal.SIGTERM) is stopping._stop\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
