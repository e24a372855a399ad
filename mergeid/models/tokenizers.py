"""A tokenizer with more tokens: the files of the old one, with new ones in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergeid.basics.reading import json_text, read_table
from mergeid.errors import MergeidError
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.companions import tokenizer_vocabulary

TOKENIZER, CONFIG, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
_SPECIAL = ("extra_special_tokens", "additional_special_tokens")
"""Lists of further special tokens in a tokenizer's config, by transformers 5 and by all versions."""
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
"""How a token is found in text unless its own tokenizer says otherwise."""


def added_tokens(model: Checkpoint) -> dict[str, dict[str, Any]]:
    """Token -> what the model's ``tokenizer.json`` says of those that were added to it."""
    path = model.tokenizer_folder / TOKENIZER
    if not model.is_folder or not path.is_file():
        return {}
    listed = read_table(path, "a tokenizer").get("added_tokens") or []
    return {str(entry["content"]): entry for entry in listed if isinstance(entry, dict) and "content" in entry}


def missing_from(tokens: Mapping[str, int], models: Sequence[tuple[Checkpoint, Mapping[str, int]]]) -> dict[str, Any]:
    """Tokens of these models that a vocabulary lacks, each as its own tokenizer finds it in text: those of the
    tokenizers' own models first, by number, then added ones; and added ones that it has as ordinary tokens."""
    added = [added_tokens(model) for model, _ in models]
    found: dict[str, Any] = {}
    for (_, rows), special in zip(models, added, strict=True):
        new = (t for t in sorted(rows, key=rows.__getitem__) if t not in tokens and t not in special)
        found |= {t: _PLAIN for t in new if t not in found}
    for (_, rows), special in zip(models, added, strict=True):
        found |= {t: entry for t, entry in special.items() if t in rows and found.get(t, _PLAIN) is _PLAIN}
    return found


def extended(folder: Path, tokens: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, int], dict[str, str]]:
    """The tokenizer of a folder with tokens that it lacks.

    Args:
        tokens: token -> how it is found in text. Those that are there stay where they are, and become added ones.

    Returns:
        Token -> number, of these; and the files that change, by name.

    Raises:
        MergeidError: no ``tokenizer.json``.
    """
    path = folder / TOKENIZER
    known = tokenizer_vocabulary(path) if path.is_file() else None
    if known is None:
        raise MergeidError(
            f"{folder} has no tokenizer.json, to which tokens can be added; save its tokenizer with transformers "
            "(AutoTokenizer.from_pretrained, save_pretrained), or choose one with --tokenizer a or --tokenizer b"
        )
    parsed = read_table(path, "a tokenizer")
    listed = {str(entry["content"]): entry for entry in parsed.get("added_tokens") or []}
    numbers: dict[str, int] = {}
    free = max(known.values(), default=-1) + 1
    for token, how in tokens.items():
        if token in listed:
            continue
        numbers[token] = known.get(token, free)
        free = max(free, numbers[token] + 1)
        listed[token] = {**_PLAIN, **how, "id": numbers[token], "content": token}
    if not numbers:
        return {}, {}
    parsed["added_tokens"] = sorted(listed.values(), key=lambda entry: int(entry["id"]))
    files = {TOKENIZER: _text(parsed)}
    new = {str(n): {**{k: listed[t][k] for k in _PLAIN}, "content": t} for t, n in numbers.items()}
    stated = read_table(folder / CONFIG, "the tokenizer's config") if (folder / CONFIG).is_file() else {}
    told = dict(stated)
    if isinstance(stated.get("added_tokens_decoder"), dict):
        told["added_tokens_decoder"] = {**stated["added_tokens_decoder"], **new}
    special = [t for t in numbers if listed[t]["special"]]
    if special and stated:
        key = next((k for k in _SPECIAL if isinstance(stated.get(k), list)), _SPECIAL[-1])
        told[key] = [*stated.get(key, []), *special]
    if told != stated:
        files[CONFIG] = _text(told)
    if (folder / ADDED).is_file():
        files[ADDED] = _text({**read_table(folder / ADDED, "added tokens"), **numbers})
    return numbers, files


def _text(parsed: Mapping[str, Any]) -> str:
    return json_text(parsed) + "\n"
