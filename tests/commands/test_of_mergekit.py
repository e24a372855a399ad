"""Options that people know from mergekit."""

from __future__ import annotations

import pytest

from mergeid.commands.cli import run
from mergeid.commands.of_mergekit import ADVICE, advised


@pytest.mark.parametrize("option", ["--cuda", "--no-copy-tokenizer", "--out-shard-size", "--no-lazy-unpickle", "-j"])
def test_options_of_mergekit_are_refused_with_what_to_do(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", "recipe.yaml", option, "-o", "out"]) == 2
    told = capsys.readouterr().err
    known = ADVICE.get(option, ADVICE["--" + option.removeprefix("--no-")] if option.startswith("--no-") else "")
    assert f"No such option: {option}, which is mergekit's: {known}; see mergeid merge --help" in told


def test_other_options_are_not_spoken_of() -> None:
    for text in ("No such option: --sed; did you mean --seed?", "Missing argument 'B'"):
        assert advised(text) == text
