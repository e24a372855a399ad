"""The generated pages of the documentation are those that the repository would make now."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from mergeid.io.written import published

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_schemas_is_up_to_date(reference: ModuleType) -> None:
    page = (DOCS / "pages" / "schemas.md").read_text(encoding="utf-8")
    assert page == reference.schemas_page(published()), "run python docs/reference.py"
    for schema in published().values():
        for name, each in schema.get("$defs", {}).items():
            assert not each.get("properties") or f"### {name.removesuffix('Entry')}" in page


def test_the_page_of_benchmarks_is_up_to_date(reference: ModuleType, tmp_path: Path) -> None:
    page = reference.benchmarks_page(reference.TABLES)
    assert (DOCS / "pages" / "benchmarks.md").read_text(encoding="utf-8") == page, "run python docs/reference.py"
    for path in reference.TABLES.glob("*.csv"):
        title = reference.OTHERS.get(path.stem, (path.stem.replace("_", " ").capitalize(),))[0]
        assert f"| {path.stem} |" in page if path.stem in reference.LIBRARIES else f"## {title}" in page
    heads = "name,traced,verified,held_again,share,spaces,seconds"
    (tmp_path / "timm.csv").write_text(f"{heads}\na,1,1,1,0.5,2,1\nb,1,1,1,0,0,1\nc,1,1,0,0.5,2,1\nd,0,,,,,\n")
    assert "| timm | 4 | 3 | 1 | 50.00% |" in reference.benchmarks_page(tmp_path), "no free space: it does not hold"
    (tmp_path / "speed.csv").write_text("what,cpu_seconds,note\nlinear|slerp,1.23456,\n")
    assert "| what | CPU seconds |\n|---|---|\n| linear\\|slerp | 1.23 |" in reference.benchmarks_page(tmp_path)
