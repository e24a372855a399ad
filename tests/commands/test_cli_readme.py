"""What the README tells people to type: the Python runs, the commands exist, the promises of its first lines hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import mergeid

README = Path(__file__).parents[2] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(encoding="utf-8"), flags=re.M | re.S)


def test_first_two_commands() -> None:
    first, second = blocks("")[0].splitlines()
    assert first == "pip install . && mergeid demo"
    assert second == "pip install '.[test]' && pytest"


def test_python(capsys: pytest.CaptureFixture[str]) -> None:
    for code in blocks("python"):
        exec(compile(code, str(README), "exec"), {"__name__": "__main__"})
    first, second = capsys.readouterr().out.splitlines()
    assert "64" in first and "float64" in first
    assert second.startswith("match ") and "0" not in re.findall(r"\d+", second)


def test_options_exist(tmp_path: Path) -> None:
    text = README.read_text(encoding="utf-8")
    commands = [line for line in blocks("")[1].splitlines() if line.startswith("mergeid ")]
    assert len(commands) == 13
    for line in commands:
        verb, *rest = line.partition("#")[0].split()[1:]
        shown = mergeid(verb, "--help", cwd=tmp_path, columns=200).stdout
        options = [word for word in rest if word.startswith("-")]
        assert all(option in shown for option in options), (line, shown)
    table = re.findall(r"^\| `(--[a-z-]+)", text, flags=re.M)
    shown = mergeid("merge", "--help", cwd=tmp_path, columns=200).stdout
    assert len(table) == 14 and all(option in shown for option in table)
