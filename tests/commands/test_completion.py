"""What a shell offers: verbs, options, and the words of options that have names for values."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import mergeid

from mergeid.matchers.protocol import matcher_names
from mergeid.methods.registry import method_names
from mergeid.request import options


def offers(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Of bash, for the last word of a line."""
    monkeypatch.setenv("_MERGEID_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
    return set(mergeid(cwd=tmp_path).stdout.split())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("mergeid sc", {"scramble"}),
        ("mergeid merge --mat", {"--match", "--matcher"}),
        ("mergeid plan --match a", {"auto", "always"}),
        ("mergeid plan --matcher s", {"sinkhorn", "straight_through"}),
        ("mergeid merge --method della", {"della", "della_linear"}),
        ("mergeid explain barr", {"barrier"}),
    ],
)
def test_a_shell_is_offered(line: str, words: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert offers(line, tmp_path, monkeypatch) == words


def test_the_offered_words_are_those_that_there_are() -> None:
    assert set(options.MATCHERS) == set(matcher_names())
    assert set(options.METHODS) == set(method_names()) - {"passthrough"}, "which is for recipes"
