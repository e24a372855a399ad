"""The house: one way through the imports, no circles, nothing at the top but what belongs there."""

from __future__ import annotations

import ast
import graphlib
import subprocess
from pathlib import Path

import pytest

import mergeid

ROOT = Path(mergeid.__file__).parent
TOP = {"__init__.py", "__main__.py", "errors.py", "plugins.py", "py.typed"}


def modules() -> dict[str, Path]:
    """Module -> its file."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = ["mergeid", *path.relative_to(ROOT).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """All modules of mergeid that a file imports, at its top, inside functions, and for type checkers alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mergeid":
            found |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in known else node.module for a in node.names
            }
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name in known}
    return found & known.keys()


def test_no_module_imports_itself_by_way_of_others() -> None:
    known = modules()
    graph = {name: imports(path, known) - {name} for name, path in known.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises where there is a circle


def test_the_circle_finder_finds_circles() -> None:
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


def test_the_top_holds_folders_and_little_else() -> None:
    assert {p.name for p in ROOT.iterdir() if p.is_file()} == TOP


def test_the_project_holds_what_it_names_and_no_output_of_a_run() -> None:
    """A merge without `--output` writes `merged` where it is run: committed, it fails whoever merges there."""
    top = Path(__file__).parents[1]
    if not (top / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=top, capture_output=True, text=True, check=True).stdout.split("\n")
    names = {name.split("/")[0] for name in listed if name and not name.startswith(".")}
    folders = {"mergeid", "adapters", "tests", "examples", "docs"}
    assert names == folders | {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"}
