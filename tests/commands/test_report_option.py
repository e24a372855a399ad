"""``--report FILE``: the page of one result, beside what the verb does anyway."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergeid.commands.cli import run


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        value = torch.randn(3, 2, generator=torch.Generator().manual_seed(seed))
        save_file({"fc.weight": value}, f"{name}.safetensors")
    return tmp_path


def test_page_of_a_plain_merge(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["merge", "a.safetensors", "b.safetensors", "--match", "never", "-o", "m.safetensors"]
    assert run([*words, "--report", "page.html"]) == 0
    page = (pair / "page.html").read_text(encoding="utf-8")
    for name in "abm":
        assert hashlib.sha256((pair / f"{name}.safetensors").read_bytes()).hexdigest() in page
    assert "The models were merged" in page and "wrote page.html" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["a.safetensors", "missing/page.html", "folder"])
def test_page_that_cannot_be_written_stops_before_any_work(
    pair: Path, page: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (pair / "folder").mkdir()
    before = {p: p.read_bytes() for p in pair.iterdir() if p.is_file()}
    words = ["merge", "a.safetensors", "b.safetensors", "--match", "never", "-o", "m.safetensors"]
    assert run([*words, "--report", page]) == 2
    said = capsys.readouterr().err
    assert said.startswith("mergeid: error: ") and "--report" in said
    assert ("such as a.html" in said) == (page == "a.safetensors")
    assert {p: p.read_bytes() for p in pair.iterdir() if p.is_file()} == before


def test_long_work_says_what_it_took(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from mergeid.commands import work

    with work.working() as told:
        told.say("result")
    assert capsys.readouterr() == ("result\n", "")
    monkeypatch.setattr(work, "LONG", 0.0)
    with work.working():
        pass
    said = capsys.readouterr()
    assert said.out == "" and re.fullmatch(r"mergeid: took 0 s( and \d+\.\d GB of memory at peak)?\n", said.err)
