"""The small files that belong beside the weights: config, tokenizer, preprocessor, labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid.basics.reading import read_json, read_table, read_text
from mergeid.errors import MergeidError, shown
from mergeid.io.beside import SUBFOLDERS, is_companion
from mergeid.io.folders import file_names

if TYPE_CHECKING:
    from mergeid.io.checkpoint import Checkpoint

_TOKENIZER = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template")
_TOKENIZER_ENDINGS = (".model", ".spm", ".bpe", ".tiktoken", ".jinja", ".vocab")

_LARGEST = 200 << 20
"""A file beyond this many bytes is data that happens to lie there."""


def default_companions(checkpoint: Checkpoint) -> list[Path]:
    """Config, tokenizer and preprocessor files of a checkpoint folder (for a single file: `config.json` only)."""
    if not checkpoint.files:  # in memory
        return []
    folder = checkpoint.path if checkpoint.is_folder else checkpoint.path.parent
    if not checkpoint.is_folder:
        return [folder / "config.json"] if (folder / "config.json").is_file() else []
    found = [p for p in sorted(folder.iterdir()) if p.is_file() and is_companion(p.name)]
    for sub in (folder / name for name in SUBFOLDERS):
        if sub.is_dir():
            found += [p for p in sorted(sub.iterdir()) if p.is_file() and is_companion(f"{sub.name}/{p.name}")]
    found = [p for p in found if p.stat().st_size <= _LARGEST]
    if checkpoint.tokenizer_folder != folder:
        place = checkpoint.tokenizer_folder
        theirs = [*sorted(place.iterdir()), *sorted(place.glob("additional_chat_templates/*.jinja"))]
        found = [p for p in found if not _of_tokenizer(p)] + [p for p in theirs if p.is_file() and _of_tokenizer(p)]
    if checkpoint.parts:
        return found + [folder / n for n in file_names(folder) if "/" in n and is_companion(n, of_parts=True)]
    return found + module_files(folder)


def _of_tokenizer(path: Path) -> bool:
    return path.name.startswith(_TOKENIZER) or path.name.endswith(_TOKENIZER_ENDINGS)


def module_files(folder: Path) -> list[Path]:
    """Files of the subfolders that a ``modules.json`` lists (a pooling or normalising step, for instance)."""
    modules = folder / "modules.json"
    if not modules.is_file():
        return []
    try:
        steps = read_json(modules)
    except MergeidError:
        return []
    names = [s.get("path") for s in steps if isinstance(s, dict)] if isinstance(steps, list) else []
    inside = [
        folder / n
        for n in names
        if isinstance(n, str) and n not in ("", "..") and Path(n).name == n and (folder / n).is_dir()
    ]
    return [p for sub in inside for p in sorted(sub.iterdir()) if p.is_file() and not p.name.startswith(".")]


def label_map(config: dict[str, Any] | None) -> dict[str, str] | None:
    """Class index -> label, from a config's ``id2label`` or ``label_names``; None where it has neither."""
    if not config:
        return None
    labels = config.get("id2label", config.get("label_names"))
    if isinstance(labels, dict):
        return {str(k): str(v) for k, v in labels.items()}
    if isinstance(labels, list):
        return {str(k): str(v) for k, v in enumerate(labels)}
    return None


def vocabulary(checkpoint: Checkpoint) -> dict[str, int] | None:
    """Token -> row of the embedding, from the folder's tokenizer files; None where it has none that can be read."""
    return vocabulary_of(checkpoint.tokenizer_folder) if checkpoint.is_folder else None


def vocabulary_of(folder: Path) -> dict[str, int] | None:
    """Token -> number, from the tokenizer files of a folder; None where it has none that can be read."""
    if (folder / "tokenizer.json").is_file():
        found = tokenizer_vocabulary(folder / "tokenizer.json")
        if found is not None:
            return found
    if (folder / "vocab.json").is_file():
        return _rows(read_table(folder / "vocab.json", "tokens and their numbers"), folder / "vocab.json")
    if (folder / "vocab.txt").is_file():
        return {t: i for i, t in enumerate(read_text(folder / "vocab.txt", "one token per line").splitlines())}
    return None


def tokenizer_vocabulary(path: Path) -> dict[str, int] | None:
    """The vocabulary of a ``tokenizer.json``; None where its model has none."""
    parsed = read_table(path, "a tokenizer")
    model = parsed.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # unigram models list (token, score) in order
        vocab = {str(entry[0]): i for i, entry in enumerate(vocab) if isinstance(entry, list) and entry}
    if not isinstance(vocab, dict):
        return None
    added = parsed.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(t, dict) and {"content", "id"} <= set(t) for t in added):
        raise MergeidError(f"{path} has added_tokens without content and id; copy or download it again")
    return {**_rows(vocab, path), **_rows({str(t["content"]): t["id"] for t in added}, path)}


def _rows(vocabulary: dict[str, Any], path: Path) -> dict[str, int]:
    for token, number in vocabulary.items():
        if not isinstance(number, int):
            raise MergeidError(f"{path} gives token {shown(token)} the number {shown(number)}; expected a whole number")
    return vocabulary


def same_tokenizer_files(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether both folders hold the same tokenizer files byte for byte (then there is nothing to parse)."""
    names = ("tokenizer.json", "vocab.json", "vocab.txt")
    for name in names:
        first, second = a.tokenizer_folder / name, b.tokenizer_folder / name
        if first.is_file() != second.is_file():
            return False
        if first.is_file() and (
            first.stat().st_size != second.stat().st_size or first.read_bytes() != second.read_bytes()
        ):
            return False
    return True
