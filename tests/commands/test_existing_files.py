"""Files that exist already are replaced only if --force says so, whatever command writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergeid.basics.reading import read_json
from mergeid.commands.cli import run
from mergeid.io.publish import write_whole

PAIR = ["none-a.safetensors", "none-b.safetensors"]
WRITERS = [
    *([verb, *PAIR, "-o", "FILE"] for verb in ("plan", "predict", "rank", "similarity")),
    *([verb, *PAIR, "--plot", "FILE.svg"] for verb in ("plan", "barrier", "similarity")),
    *([verb, *PAIR, "--report", "FILE.html"] for verb in ("merge", "plan", "predict", "barrier")),
    ["barrier", *PAIR, "-o", "FILE"],
    ["report", *PAIR, "-o", "FILE"],
    ["graph", PAIR[0], "-o", "FILE"],
    ["graph", PAIR[0], "--json", "FILE"],
    ["sketch", PAIR[0], "-o", "FILE.sketch"],
]
DATA = {"barrier", "report", "similarity", "sketch"}


@pytest.mark.parametrize("words", WRITERS, ids=lambda words: f"{words[0]} {words[-2]}")
def test_a_file_that_exists_is_kept(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty one holds nothing that could be lost. The models do not exist: no work was begun."""
    monkeypatch.chdir(tmp_path)
    words = [*words, "--data", "none.npz"] if words[0] in DATA else words
    words = [word.replace("FILE", "notes.txt") for word in words]
    file = tmp_path / next(word for word in words if word.startswith("notes"))
    file.write_text("of somebody else")
    assert run(words) == 2
    assert f"output {file.name} exists already; choose another name" in capsys.readouterr().err
    assert run([*words, "--force"]) == 2
    assert "none-a.safetensors" in capsys.readouterr().err
    assert file.read_text() == "of somebody else"
    file.write_text("")
    assert run(words) == 2
    assert "none-a.safetensors" in capsys.readouterr().err


def test_a_home_that_the_shell_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in --option=~/file. The file was looked for in a folder called ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write_whole(Path("~/graph.json"), "{}", "-o")
    assert (tmp_path / "graph.json").read_text() == "{}" and read_json("~/graph.json") == {}
    assert run(["plan", *PAIR, "--output=~/graph.json"]) == 2  # which has something in it
    assert "output ~/graph.json exists already" in capsys.readouterr().err
