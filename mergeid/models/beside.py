"""The small files beside weights in which models differ: the merge has the first model's, and that is said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from mergeid.basics.reading import read_table
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.companions import module_files, vocabulary
from mergeid.models.chat_templates import chat_template
from mergeid.models.configs import called_apart, differing
from mergeid.models.token_numbers import GENERATION
from mergeid.plugins import ConfigDifference

TOKENS = ("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id")
UNREAD = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
"""Tokenizers whose tokens are not compared."""


def differences_beside(models: Sequence[Checkpoint], *, tokens: bool, template: bool) -> list[str]:
    """What the user should know, a sentence for each thing.

    Args:
        models: those that are merged, the base not among them.
        tokens: whether the user chose whose tokens count, and their numbers with them.
        template: whether the user chose a chat template.
    """
    first, *others = models
    if not first.is_folder or not first.files or first.parts:
        return []
    notes: list[str] = []
    for i, other in enumerate(others, 1):
        if not other.is_folder or not other.files:
            continue
        two, letter = " and ".join(called_apart(first, other)), ascii_lowercase[i : i + 1]
        if not tokens:
            notes += _numbers(two, first, other) + _tokenizers(two, first, other, letter)
        if not template:
            notes += _templates(two, first, other, letter)
        notes += _modules(two, first, other)
        if (other.path / GENERATION).is_file() and not (first.path / GENERATION).is_file():
            notes.append(f"{other.source} has {GENERATION}; the result has none, since {first.source} has none")
    return notes


def _numbers(two: str, first: Checkpoint, other: Checkpoint) -> list[str]:
    mine, theirs = _special(first), _special(other)
    both = [k for k in TOKENS if k in mine and k in theirs and _many(mine[k]) != _many(theirs[k])]
    found = [ConfigDifference(k, mine[k], theirs[k]) for k in both]
    if not found:
        return []
    return [f"{two} differ in {differing(found)}, which generation uses; the result has that of {first.source}"]


def _special(model: Checkpoint) -> dict[str, Any]:
    """Numbers of special tokens, those of the generation's settings first."""
    path, config = model.path / GENERATION, model.config or {}
    inner = config.get("text_config")
    levels: list[Mapping[str, Any]] = [inner] if isinstance(inner, dict) else []
    levels += [config, *([read_table(path, "settings of generation")] if path.is_file() else [])]
    return {k: v for level in levels for k, v in level.items() if k in TOKENS and v is not None}


def _many(value: Any) -> list[str]:
    return sorted(map(str, value if isinstance(value, list) else [value]))


def _tokenizers(two: str, first: Checkpoint, other: Checkpoint, letter: str) -> list[str]:
    mine, theirs = _tokenizer(first), _tokenizer(other)
    if theirs and not mine:
        return [
            f"{other.source} has a tokenizer; the result has none, since {first.source} has none (--tokenizer {letter} "
            "takes it)"
        ]
    for name in UNREAD:
        both = first.tokenizer_folder / name, other.tokenizer_folder / name
        differ = all(p.is_file() for p in both) and both[0].read_bytes() != both[1].read_bytes()
        if differ and (vocabulary(first) is None or vocabulary(other) is None):
            return [f"{name} of {two} differs, and its tokens are not compared; the result has that of the first"]
    return []


def _tokenizer(model: Checkpoint) -> bool:
    folder = model.tokenizer_folder
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt", *UNREAD))


def _templates(two: str, first: Checkpoint, other: Checkpoint, letter: str) -> list[str]:
    mine, theirs = chat_template(first), chat_template(other)
    if theirs is None or (mine or "").strip() == theirs.strip():
        return []
    take = f"(--chat-template {letter} takes that of {other.source})"
    if mine is None:
        return [f"{other.source} has a chat template; the result has none, since {first.source} has none {take}"]
    return [f"{two} have different chat templates; the result has that of {first.source} {take}"]


def _modules(two: str, first: Checkpoint, other: Checkpoint) -> list[str]:
    """What lies behind an encoder whose weights alone are merged: how tokens are pooled to a sentence."""
    found: list[ConfigDifference] = []
    for path in module_files(first.path):
        name = path.relative_to(first.path)
        if path.suffix == ".json" and (other.path / name).is_file():
            mine, theirs = (_table(folder / name) for folder in (first.path, other.path))
            keys = [k for k in sorted({*mine, *theirs}) if mine.get(k) != theirs.get(k)]
            found += [ConfigDifference(f"{name.as_posix()}: {k}", mine.get(k), theirs.get(k)) for k in keys]
    if not found:
        return []
    told = f"{two} differ in {differing(found)}, which decides how a text becomes a vector"
    return [f"{told}; the result has that of {first.source}"]


def _table(path: Path) -> dict[str, Any]:
    return read_table(path, "settings of a module")
