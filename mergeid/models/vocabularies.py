"""Vocabularies that differ: rows of embeddings and heads are brought together by token, not by number.

A token that a model does not have gets, for that model, the mean of the rows of those that have it, so that any average
leaves it as it is there (as in mergekit).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mergeid.errors import MergeidError, shown
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.companions import vocabulary
from mergeid.io.derived import Derived, Formed, derived, read_from
from mergeid.io.tensors import TensorSource
from mergeid.plugins import TensorInfo

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

_PADDING = "\0"
"""Begins what stands for the token of a row that has none."""
_IN_LAYERS = re.compile(r"\.\d+\.")


@dataclass
class OneVocabulary:
    """Models with the same tokens in the same rows.

    Attributes:
        models: in the order given.
        notes: what the user should know.
    """

    models: list[Checkpoint]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Rows:
    """A model's rows by token.

    Attributes:
        size: number of rows.
        of: token -> row; rows without a token (padding) bear their number as one.
        named: whether the tokens are those of a tokenizer.
    """

    size: int
    of: dict[str, int]
    named: bool

    @classmethod
    def read(cls, model: Checkpoint) -> Rows:
        """Raises `MergeidError` where the config does not say how many rows there are."""
        size = _size(model)
        if size is None:
            raise MergeidError(f"the config of {model.source} does not say how large its vocabulary is (vocab_size)")
        tokens = vocabulary(model)
        known = {t: row for t, row in (tokens or {}).items() if 0 <= row < size}
        used = set(known.values())
        padding = {f"{_PADDING}{row}": row for row in range(size) if row not in used}
        return cls(size, {**known, **padding}, tokens is not None)


def one_vocabulary(models: Sequence[Checkpoint], choice: str | None, has_base: bool) -> OneVocabulary:
    """Give all models the vocabulary that was chosen.

    Args:
        models: all that meet, the base last.
        choice: "union": every token of any model, the first model's first; "a", "b", …: that model's tokens; "base";
            None: nothing is done.
        has_base: whether the last model is the base.

    Raises:
        MergeidError: a choice that names no model, a model that is no folder, or no tokenizer that has all tokens.
    """
    if choice is None:
        return OneVocabulary(list(models))
    letters = "abcdefghijklmnopqrstuvwxyz"
    chosen = len(models) - 1 if choice == "base" and has_base else letters.find(choice) if len(choice) == 1 else -1
    if choice != "union" and not 0 <= chosen < len(models):
        raise MergeidError(f"--tokenizer {choice!r} is not the letter of a model; expected union, a, b, … or base")
    rows = [Rows.read(model) for model in models]
    if choice == "union":
        chosen = _largest(models, rows)
    target = rows[chosen]
    names = [_vocabulary_tensors(model, own.size) for model, own in zip(models, rows, strict=True)]
    found = OneVocabulary([])
    for i, (model, own) in enumerate(zip(models, rows, strict=True)):
        if own.of == target.of and own.size == target.size:
            found.models.append(model)
            continue
        found.models.append(_in_order(i, models, rows, target, names))
        here, there = len(own.of.keys() & target.of.keys()), own.size
        left = len(own.of.keys() - target.of.keys())
        found.notes.append(
            f"{here} of the {there} rows of {model.source} belong to tokens of the result, which has {target.size}"
            + (f"; {left} are left out" if left else "")
        )
    if target.named and not models[chosen].is_folder:
        raise MergeidError(
            f"{models[chosen].source} is not a folder; expected one with a tokenizer for --tokenizer {choice}"
        )
    place = models[chosen].path
    if target.named and any(m.is_folder and m.path != place for m in models):
        found.models = [_with_tokenizer(m, place) if m.path != place else m for m in found.models]
        if chosen:
            found.notes.append(f"the tokenizer is that of {models[chosen].source}")
    return found


def _with_tokenizer(model: Checkpoint, place: Path) -> Checkpoint:
    if not isinstance(model, Derived):
        formed = {name: read_from(model, name) for name in model.table}
        model = derived(model.source, model, formed, parents=[model])
    return replace(model, tokenizer=place)


def _largest(models: Sequence[TensorSource], rows: Sequence[Rows]) -> int:
    """The model that has every token of all."""
    named = any(own.named for own in rows)
    everything = {t for own in rows for t in own.of if not (named and t.startswith(_PADDING))}
    whole = [i for i, own in enumerate(rows) if everything <= own.of.keys()]
    if whole:
        return whole[0]
    one = models[0].source
    token = next(t for t in everything if t not in rows[0].of)
    other = next(m.source for m, own in zip(models, rows, strict=True) if token in own.of)
    raise MergeidError(
        f"no model has every token: {other} has {shown(token)}, {one} lacks it but has other tokens, and the two "
        f"tokenizers cannot be combined; choose one with --tokenizer a or --tokenizer b"
    )


def _in_order(
    at: int, models: Sequence[Checkpoint], rows: Sequence[Rows], target: Rows, names: Sequence[set[str]]
) -> Derived:
    """One model with its rows where the target has their tokens."""
    model = models[at]
    formed = {name: read_from(model, name) for name in model.table}
    for name in names[at]:
        if not all(name in other for other in names):
            raise MergeidError(
                f"tensor {name!r} has one row per token only in {model.source}; expected the same in all models"
            )
        formed[name] = _reordered(at, name, models, rows, target)
    config = dict(model.config or {})
    nested = config.get("text_config")
    if "vocab_size" in config:
        config["vocab_size"] = target.size
    elif isinstance(nested, dict):
        config["text_config"] = {**nested, "vocab_size": target.size}
    return derived(model.source, model, formed, parents=[model], config=config)


def _reordered(at: int, name: str, models: Sequence[TensorSource], rows: Sequence[Rows], target: Rows) -> Formed:
    model = models[at]
    info = model.table[name]
    order = sorted(target.of.items(), key=lambda item: item[1])

    def form() -> Tensor:
        import torch

        found = torch.zeros((target.size, *info.shape[1:]), dtype=model.tensor(name).dtype)
        own = [(row, rows[at].of[t]) for t, row in order if t in rows[at].of]
        if own:
            to, of = (torch.tensor(side) for side in zip(*own, strict=True))
            found[to] = model.tensor(name)[of]
        for token, row in order:
            if token not in rows[at].of:
                have = [(m, r.of[token]) for m, r in zip(models, rows, strict=True) if token in r.of]
                found[row] = torch.stack([m.tensor(name)[place].double() for m, place in have]).mean(0)
        return found

    return Formed(TensorInfo(info.dtype, (target.size, *info.shape[1:])), form, tuple((m, name) for m in models))


def _size(model: TensorSource) -> int | None:
    config: dict[str, Any] = model.config or {}
    nested = config.get("text_config")
    size = config.get("vocab_size") or (nested.get("vocab_size") if isinstance(nested, dict) else None)
    return size if isinstance(size, int) and size > 0 else None


def _vocabulary_tensors(model: TensorSource, size: int) -> set[str]:
    """Tensors with a row per token: as many rows as the config says, outside of the layers."""
    return {
        name for name, info in model.table.items() if info.shape[:1] == (size,) and not _IN_LAYERS.search(f".{name}")
    }
