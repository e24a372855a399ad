"""Text through the checkpoint's own tokenizer: files of lines, jsonl records, lists of strings."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mergeid.data.batching import IGNORED, Item, ItemDataset, told
from mergeid.data.chat import chat_name, written_out
from mergeid.data.targets import add_targets, mask_tokens
from mergeid.errors import MergeidError, listed

TEXT_NAMES = ("text", "sentence", "content", "input", "prompt", "question", "premise")
SECOND_NAMES = ("text_pair", "sentence2", "hypothesis", "text2")
TARGET_NAMES = ("target", "summary", "answer", "output", "completion")
LABEL_NAMES = ("label", "labels", "y", "class")
COLUMNS = {".csv": ",", ".tsv": "\t"}
"""Ending of a table's file -> what separates its columns."""


def load_tokenizer(folder: Path | None) -> Any:
    """The tokenizer that lies beside the weights. Raises `MergeidError` where there is none; never runs its code."""
    if folder is None:
        raise MergeidError(
            "text data needs a tokenizer, but the checkpoint is a single file; give a folder with tokenizer files, "
            "or data that consists of token ids (input_ids in a .safetensors or .npz file)"
        )
    from transformers import AutoTokenizer

    if not any(folder.glob("*token*")) and not any(
        (folder / n).is_file() for n in ("vocab.txt", "vocab.json", "spiece.model")
    ):
        raise MergeidError(
            f"{folder} contains no tokenizer (tokenizer.json, vocab.txt, …), which text data needs; add the files of "
            f"the "
            "model's tokenizer, or give data that consists of token ids (input_ids in a .safetensors or .npz file)"
        )
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raise whatever their file formats' parsers raise
        raise MergeidError(f"the tokenizer in {folder} cannot be loaded ({told(error)}); repair its files") from error


def read_text(path: Path) -> str:
    """A text file's content, without the mark that some editors put first. Raises `MergeidError` where it is not
    UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise MergeidError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a ``.jsonl`` file (one JSON object per line) or ``.json`` file (a list of objects)."""
    text = read_text(path)
    if path.suffix.lower() == ".json":
        rows = _parsed(text, str(path))
        rows = rows.get("data", rows) if isinstance(rows, dict) else rows
        if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
            raise MergeidError(f'{path} must hold a list of objects such as {{"text": …, "label": …}}')
        return rows
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would also split inside strings
        if not line.strip():
            continue
        row = _parsed(line, f"{path}, line {number},")
        if not isinstance(row, dict):
            raise MergeidError(f'{path}, line {number}, must be an object such as {{"text": …, "label": …}}')
        rows.append(row)
    return rows


def read_columns(path: Path, separator: str) -> list[dict[str, Any]] | None:
    """The records of a ``.csv`` or ``.tsv`` file whose first line names a column of text; None for any other, which is
    read as plain text. Labels that are written in digits are numbers.

    Raises `MergeidError` for a line with more or fewer columns."""
    lines = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=separator)
    rows: list[dict[str, Any]] = []
    try:
        names = [name.strip() for name in next(lines, [])]
        if not set(names) & set(TEXT_NAMES):
            return None
        for values in lines:
            if not values:
                continue
            if len(values) != len(names):
                raise MergeidError(
                    f"{path}, line {lines.line_num}, has {len(values)} columns where the first line has {len(names)}; "
                    "put text that holds the separator in quotes"
                )
            rows.append({n: _number(v) if n in LABEL_NAMES else v for n, v in zip(names, values, strict=True)})
    except csv.Error as error:
        raise MergeidError(f"{path}, line {lines.line_num}, cannot be read ({told(error)}); repair it") from error
    return rows


def _number(text: str) -> int | str:
    digits = text.strip().removeprefix("-")
    return int(text) if digits.isascii() and digits.isdecimal() and len(digits) < 19 else text


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise MergeidError(f"{what} is not JSON ({error}); repair it") from error
    except (RecursionError, ValueError) as error:  # nested too deeply; numbers of thousands of digits
        raise MergeidError(f"{what} cannot be read as JSON ({told(error)}); repair it") from error


def _text(row: Mapping[str, Any], name: str, index: int) -> str:
    """A text of a record. Halves of surrogate pairs, which JSON can spell and no tokenizer takes, become U+FFFD."""
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise MergeidError(f"record {index + 1} has {name!r} of the kind {type(value).__name__}; expected text")
    return str(value).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def text_file(
    paths: Sequence[Path], about: Mapping[str, Any], folder: Path | None, seed: int, source: str
) -> ItemDataset:
    """Plain text. Causal models get the whole text in blocks of ``max_length`` tokens, others one line per example."""
    texts = [read_text(p) for p in paths]
    if about.get("task") == "causal":
        return _blocks(texts, about, folder, source)
    lines = [line.strip() for t in texts for line in t.splitlines() if line.strip()]
    return record_dataset([{"text": line} for line in lines], about, folder, seed, source)


def _blocks(texts: Sequence[str], about: Mapping[str, Any], folder: Path | None, source: str) -> ItemDataset:
    tokenizer = load_tokenizer(folder)
    length = int(about["max_length"])
    ids: list[int] = []
    for text in texts:
        # verbose=False: a warning that the text is longer than the model is what the blocks are for
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    blocks = [ids[i : i + length] for i in range(0, len(ids), length)]
    blocks = [b for b in blocks if len(b) == length or len(blocks) == 1]
    blocks = [b for b in blocks if len(b) > 1]

    def get(index: int) -> Item:
        return _item(blocks[index], about)

    return ItemDataset(len(blocks), get, source=source)


def _item(ids: Sequence[int], about: Mapping[str, Any], mask: Sequence[int] | None = None) -> Item:
    item = Item(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask if mask is not None else [1] * len(ids)))
    item.pad_id = int(about.get("pad_id") or 0)
    add_targets(item, about, ignored=IGNORED)
    return item


def record_dataset(
    rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], folder: Path | None, seed: int, source: str
) -> ItemDataset:
    """Records such as ``{"text": …, "label": …}`` (also ``text_pair``, and ``target`` for encoder-decoders), or
    conversations, ``{"messages": [{"role": …, "content": …}]}``."""
    tokenizer = load_tokenizer(folder) if rows else None
    chats = chat_name(rows) if _name_of(rows, TEXT_NAMES) is None else None
    if chats is not None:
        rows = written_out(rows, chats, tokenizer, source)
    text_name = _name_of(rows, TEXT_NAMES)
    if rows and text_name is None:
        _refuse_mixed(rows, TEXT_NAMES, source)
        given = listed(rows[0]) or "nothing"
        raise MergeidError(
            f"the data {source} has no text: its records hold {given}; expected one of {', '.join(TEXT_NAMES)}"
        )
    pair_name = _name_of(rows, SECOND_NAMES)
    target_name = _name_of(rows, TARGET_NAMES) if about.get("task") == "seq2seq" else None
    if about.get("classes") and _name_of(rows, LABEL_NAMES) is None:
        _refuse_mixed(rows, LABEL_NAMES, source)
    labels = _labels(rows, about, source)

    columns = _Columns(str(text_name), pair_name, target_name, written=chats is not None)

    def get(index: int) -> Item:
        row = rows[index]
        return _encode(tokenizer, row, columns, about, labels, index, seed)

    return ItemDataset(len(rows), get, source=source, labels=labels)


class _Columns(NamedTuple):
    """Names of what is read of a row, and whether its text has all special tokens already."""

    text: str
    pair: str | None
    target: str | None
    written: bool


def _encode(
    tokenizer: Any,
    row: Mapping[str, Any],
    columns: _Columns,
    about: Mapping[str, Any],
    labels: torch.Tensor | None,
    index: int,
    seed: int,
) -> Item:
    length, task = int(about["max_length"]), about.get("task")
    texts = [_text(row, n, index) for n in (columns.text, columns.pair) if n is not None]
    made = tokenizer(
        *texts,
        truncation=True,
        max_length=length,
        return_special_tokens_mask=True,
        add_special_tokens=not columns.written,
    )
    ids = made["input_ids"] or [int(about.get("pad_id") or 0)]
    item = Item(input_ids=torch.tensor(ids), attention_mask=torch.ones(len(ids), dtype=torch.long))
    if "token_type_ids" in made and columns.pair:
        item["token_type_ids"] = torch.tensor(made["token_type_ids"])
    item.pad_id = int(about.get("pad_id") or 0)
    if task == "masked":
        if tokenizer.mask_token_id is None:
            raise MergeidError(
                "the tokenizer has no mask token, which masked language models need; name one in tokenizer_config.json"
            )
        special = torch.tensor(made["special_tokens_mask"], dtype=torch.bool)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
        item["input_ids"], item["labels"] = mask_tokens(
            item["input_ids"], special, tokenizer.mask_token_id, generator, ignored=IGNORED
        )
    elif columns.target is not None:
        target = tokenizer(text_target=_text(row, columns.target, index), truncation=True, max_length=length)
        item["labels"] = torch.tensor(target["input_ids"])
        add_targets(item, about, ignored=IGNORED)
    elif task in ("causal", "seq2seq"):
        add_targets(item, about, ignored=IGNORED)
    elif labels is not None:
        item["labels"] = labels[index]
    return item


def _name_of(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str | None:
    return next((n for n in names if rows and all(n in r for r in rows)), None)


def _refuse_mixed(rows: Sequence[Mapping[str, Any]], names: Sequence[str], source: str) -> None:
    """Raises `MergeidError` where some of the records have what all of them must have."""
    for name in names:
        without = [i for i, row in enumerate(rows, 1) if name not in row]
        if 0 < len(without) < len(rows):
            raise MergeidError(
                f"the data {source} has {name!r} in {len(rows) - len(without)} of {len(rows)} records, and not in "
                f"record {without[0]}; give it to all of them or to none"
            )


def _labels(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], source: str) -> torch.Tensor | None:
    name = _name_of(rows, LABEL_NAMES)
    if name is None or not about.get("classes"):
        return None
    known: Mapping[str, int] = about.get("class_names") or {}
    found: list[int] = []
    for row in rows:
        label = row[name]
        if isinstance(label, str) and label in known:
            label = known[label]
        if isinstance(label, float) and label.is_integer():
            label = int(label)
        if isinstance(label, bool) or not isinstance(label, int) or label.bit_length() > 63:
            choices = ", ".join(list(known)[:10]) if known else f"0 to {about['classes'] - 1}"
            raise MergeidError(
                f"the data {source} has the label {_short(label)}, which the model does not know; expected {choices}"
            )
        found.append(label)
    return torch.tensor(found)


def _short(value: Any) -> str:
    """A label in a message: an integer of thousands of digits has no text at all."""
    if isinstance(value, int) and value.bit_length() > 63:
        return "of more than 63 bits"
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "…"
