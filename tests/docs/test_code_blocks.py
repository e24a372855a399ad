"""Every code block of the README and the documentation: Python runs, commands parse, outputs are a script's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from mergeid.matchers import protocol
from mergeid.matchers.protocol import matcher_names
from mergeid.methods import registry
from mergeid.methods.registry import method_names
from mergeid.neuron_graph import rules

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs" / "pages").glob("*.md"))
FENCE = re.compile(r"^```([a-z]*)[^\n]*\n(.*?)^```$", flags=re.M | re.S)
LANGUAGES = {"", "python", "console", "text", "yaml", "toml", "json"}


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def commands() -> list[tuple[str, str]]:
    """(page, line) of every command of mergeid that a reader may type."""
    return [
        (page.name, line.removeprefix("$ ").partition("  #")[0])
        for page in (README, *PAGES)
        for block in blocks(page, "console")
        for line in block.splitlines()
        if line.startswith("$ mergeid ")
    ]


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module, name in ((registry, "_registered"), (protocol, "_registered"), (rules, "_RULES")):
        registry_of: dict[str, Any] = getattr(module, name)
        monkeypatch.setattr(module, name, dict(registry_of))
    yield


def test_first_two_commands() -> None:
    first, second = blocks(README, "")[0].splitlines()
    assert first == "pip install . && mergeid demo"
    assert second == "pip install '.[test]' && pytest"
    assert len(README.read_bytes()) <= 8_000


@pytest.mark.parametrize("page", [p for p in (README, *PAGES) if blocks(p, "python")], ids=lambda p: p.stem)
def test_python(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registries: None) -> None:
    """All blocks of a page one after the other, in one namespace and an empty folder."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), names)


def test_matching_undoes_a_permutation(capsys: pytest.CaptureFixture[str], registries: None) -> None:
    """What the page on Python promises of its example."""
    exec(compile(blocks(ROOT / "docs/pages/python.md", "python")[0], "python.md", "exec"), {"__name__": "__main__"})
    first, second = capsys.readouterr().out.splitlines()
    assert "64" in first and "float64" in first
    assert second.startswith("match ") and "0" not in re.findall(r"\d+", second)


def test_languages() -> None:
    for page in (README, *PAGES):
        found = {kind for kind, _ in FENCE.findall(page.read_text(encoding="utf-8"))}
        assert found <= LANGUAGES, page


def test_commands_parse() -> None:
    """Each command of the documentation has the arguments and options that it is shown with."""
    from mergeid.commands.app import app

    group: Any = typer.main.get_command(app)
    found = commands()
    assert len(found) > 25
    for page, line in found:
        verb, *words = shlex.split(line)[1:]
        assert verb in group.commands, (page, line)
        if verb == "graph":
            from mergeid.commands.graph import spell_out_json

            words = spell_out_json(words, group.commands[verb])
        try:
            group.commands[verb].make_context(verb, words)
        except Exception as error:  # typer brings its own copy of click from some version on
            pytest.fail(f"{page}: {line}: {error}")


def test_every_verb_method_and_matcher_is_documented() -> None:
    from mergeid.commands.app import app

    told = (ROOT / "docs/pages/commands.md").read_text(encoding="utf-8")
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert [v for v in verbs if f"## mergeid {v}\n" not in told] == []
    told = (ROOT / "docs/pages/methods.md").read_text(encoding="utf-8")
    assert [n for n in (*method_names(), *matcher_names()) if f"`{n}`" not in told] == []


def test_outputs_are_those_of_the_script() -> None:
    """Every output that a page shows was written by docs/outputs.py, with the command that it names."""
    namespace: dict[str, Any] = {"__name__": "outputs", "__file__": str(ROOT / "docs/outputs.py")}
    exec(compile((ROOT / "docs/outputs.py").read_text(encoding="utf-8"), "outputs.py", "exec"), namespace)
    for page in PAGES:
        for name in re.findall(r'--8<-- "(.+)\.txt"', page.read_text(encoding="utf-8")):
            text = (ROOT / "docs/pages/output" / f"{name}.txt").read_text(encoding="utf-8")
            assert text.startswith(f"$ mergeid {namespace['RUNS'][name]}\n"), name


def test_links_of_the_readme() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (ROOT / target).is_file(), target


@pytest.mark.slow
def test_site_builds_strictly(tmp_path: Path) -> None:
    import subprocess
    import sys

    pytest.importorskip("mkdocs", reason="the site needs the extra docs")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(ROOT / "docs/mkdocs.yml")]
    done = subprocess.run([*words, "-d", str(tmp_path / "site")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "site/commands/index.html").is_file()


def test_every_measured_figure_names_its_script() -> None:
    """One that is there, or the row says that there is none."""
    page = (ROOT / "docs/pages/measured.md").read_text(encoding="utf-8")
    rows = [row for row in page.partition("## Coverage")[0].splitlines() if row.startswith("| ")][1:]
    assert len(rows) > 20
    for row in rows:
        what = row.split(" | ")[0]
        named = [n.split()[0] for n in re.findall(r"`([^`]+/[^`]+)`", what)]
        assert any((ROOT / n).exists() for n in named) != what.endswith("(measured once, no script)"), what
