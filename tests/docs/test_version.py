"""One version everywhere."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_package_the_citation_and_the_changelog_name_one_version() -> None:
    def found(pattern: str, name: str) -> str:
        match = re.search(pattern, (ROOT / name).read_text(encoding="utf-8"), flags=re.M)
        assert match is not None, name
        return match[1]

    version = found(r'^version = "(\d+\.\d+\.\d+)"$', "pyproject.toml")
    assert found(r"^version: (\S+)$", "CITATION.cff") == version
    assert found(r"^## (\d+\.\d+\.\d+)\b", "CHANGELOG.md") == version, "the newest release"
