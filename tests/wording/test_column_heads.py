"""Every head of a table is a word that `mergeid explain` knows, unless it says itself what stands below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from mergeid.reporting.terms import explain
from mergeid.results.comparison import label

ROOT = Path(__file__).parent.parent.parent / "mergeid"
SAY_THEMSELVES = {
    *("A", "B", "merge", "model", "candidate", "layer", "package", "version", "adapter", "architectures"),
    *("afterwards", "memory", "disk", "time"),
}


def heads() -> Iterator[str]:
    """As they stand in the sources; what is filled in is a number here."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Column":
                if isinstance(head := node.args[0], ast.Constant):
                    yield head.value
                elif isinstance(head, ast.JoinedStr):
                    filled = "".join(v.value if isinstance(v, ast.Constant) else "0.01" for v in head.values)
                    yield filled.removeprefix("0.01")  # the name of a curve


FOUND = sorted({head for head in heads() if head} - SAY_THEMSELVES)


def test_the_heads_are_found() -> None:
    assert {"space", "nats lost", "≤ 0.01 nats", "accuracy", "CKA"} <= set(FOUND)


@pytest.mark.parametrize("head", FOUND)
def test_a_head_is_explained(head: str) -> None:
    assert explain(head).meaning.endswith(".")


@pytest.mark.parametrize("merge", ["plain", "mixed", "matched"])
@pytest.mark.parametrize("repair", ["none", "bn", "repair", "regmean", "solve", "solve+lean", "solve+polish"])
def test_every_merge_that_the_last_look_names_is_explained(merge: str, repair: str) -> None:
    assert explain(label(merge, repair)).name == {
        "none": {"plain": "direct", "mixed": "mixed", "matched": "match"}[merge],
        "bn": "repaired",
        "repair": "repaired",
        "regmean": "regmean",
    }.get(repair, "solved")
