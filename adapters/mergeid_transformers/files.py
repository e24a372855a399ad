"""The small files of a checkpoint folder: which of them travel with the weights, and where two folders disagree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergeid import plugins

COMPANION_SUFFIXES = frozenset({".json", ".txt", ".jinja", ".model", ".vocab", ".bpe", ".spm", ".tiktoken"})
# Weights by another name, tables of contents of shards (the writer makes its own), training state, our own record.
NOT_COMPANIONS = frozenset(
    {
        "model.safetensors.index.json",
        "pytorch_model.bin.index.json",
        "diffusion_pytorch_model.safetensors.index.json",
        "trainer_state.json",
        "all_results.json",
        "train_results.json",
        "eval_results.json",
        "requirements.txt",
        "mergeid.json",
    }
)
VOCABULARY_FILES = (
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)
TOKENIZER_SECTIONS = ("normalizer", "pre_tokenizer")


def companion_files(folder: Path) -> list[Path]:
    """Config, tokenizer, processor and pipeline files of a folder, sorted; no weights, no code, no README.

    Sub-folders count where they hold only such files (sentence-transformers' ``1_Pooling``,
    ``additional_chat_templates``).
    """
    if not folder.is_dir():
        return []
    found = [p for p in sorted(folder.iterdir()) if p.is_file() and _is_companion(p)]
    for sub in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if (sub.name[:1].isdigit() and "_" in sub.name) or sub.name == "additional_chat_templates":
            found += [p for p in sorted(sub.iterdir()) if p.is_file() and _is_companion(p)]
    return found


def _is_companion(path: Path) -> bool:
    return (
        path.suffix in COMPANION_SUFFIXES
        and not path.name.startswith(".")
        and path.name not in NOT_COMPANIONS
        and not path.name.endswith(".index.json")
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None where there is no such file. Raises `MergeidError` where it is not JSON."""
    if not path.is_file():
        return None
    found = plugins.read_json(path, "JSON that transformers wrote")
    return found if isinstance(found, dict) else None


def differences(a: Path, b: Path) -> list[str]:
    """What in two folders gives outputs or inputs of the same index another meaning: label maps, tokenizers.

    Only what both folders state is compared. Each entry is a sentence that names the first difference.
    """
    return [d for d in (_label_difference(a, b), _tokenizer_difference(a, b)) if d is not None]


def _label_map(folder: Path) -> dict[int, str]:
    found = (read_json(folder / "config.json") or {}).get("id2label")
    if not isinstance(found, Mapping):
        return {}
    return {int(k): str(v) for k, v in found.items() if str(k).isdecimal() and len(str(k)) < 10}


def _label_difference(a: Path, b: Path) -> str | None:
    mine, theirs = _label_map(a), _label_map(b)
    if not mine or not theirs:
        return None
    if len(mine) != len(theirs):
        return f"label maps differ: A's config.json has {len(mine)} labels, B's has {len(theirs)}"
    for i, label in sorted(mine.items()):
        if theirs.get(i) != label:
            other = repr(theirs[i]) if i in theirs else "missing"
            return f"label maps differ: label {i} is {label!r} in A's config.json and {other} in B's"
    return None


def _tokenizer_difference(a: Path, b: Path) -> str | None:
    mine, theirs = a / "tokenizer.json", b / "tokenizer.json"
    if mine.is_file() and theirs.is_file():
        if mine.read_bytes() == theirs.read_bytes():
            return None
        return _tokenizer_json_difference(read_json(mine) or {}, read_json(theirs) or {})
    for name in VOCABULARY_FILES:
        mine, theirs = a / name, b / name
        if mine.is_file() and theirs.is_file():
            x, y = (p.read_bytes().replace(b"\r\n", b"\n").rstrip() for p in (mine, theirs))
            if x != y:
                return f"tokenizers differ: {name} of A and B are not the same"
    return None


def _tokenizer_json_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    mine, theirs = _vocabulary(a), _vocabulary(b)
    for token, i in mine.items():
        if theirs.get(token) != i:
            other = f"id {theirs[token]}" if token in theirs else "missing"
            return f"tokenizers differ: token {token!r} has id {i} in A's tokenizer.json and is {other} in B's"
    for token in theirs:
        if token not in mine:
            return f"tokenizers differ: token {token!r} is in B's tokenizer.json and missing in A's"
    if (a.get("model") or {}).get("merges") != (b.get("model") or {}).get("merges"):
        return "tokenizers differ: the merge rules in A's and B's tokenizer.json are not the same"
    for section in TOKENIZER_SECTIONS:
        if a.get(section) != b.get(section):
            return f"tokenizers differ: section {section!r} of A's and B's tokenizer.json is not the same"
    return None


def _vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # unigram models: a list of (token, score), the id is the place
        vocabulary = {entry[0]: i for i, entry in enumerate(vocabulary)}
    added = {t["content"]: t["id"] for t in tokenizer.get("added_tokens") or [] if "content" in t and "id" in t}
    return {**vocabulary, **added}
