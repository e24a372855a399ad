"""Vocabularies that differ: rows of embeddings and heads are brought together by token, not by number.

A token that a model does not have gets, for that model, the base's row, or the mean of the rows of those that have it,
so that any average leaves it as it is there (as in mergekit).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from mergeid.errors import MergeidError, shown
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.companions import vocabulary, vocabulary_of
from mergeid.io.derived import Derived, derived, read_from
from mergeid.io.tensors import TensorSource
from mergeid.models.token_numbers import renumbered
from mergeid.models.token_rows import Rows, Target, reordered
from mergeid.models.tokenizers import extended, missing_from
from mergeid.request.vocabulary import Vocabulary

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


def one_vocabulary(models: Sequence[Checkpoint], asked: Vocabulary | None, has_base: bool) -> OneVocabulary:
    """Give all models the vocabulary that was asked for.

    Args:
        models: all that meet, the base last.
        asked: None: nothing is done.
        has_base: whether the last model is the base.

    Raises:
        MergeidError: a choice that names no model, a model that is no folder, tokens that a model does not have, or a
            tokenizer that takes no more tokens.
    """
    found = OneVocabulary(list(models))
    if asked is None:
        return found
    if any(m.module is not None for m in models):
        raise MergeidError("--tokenizer works on files; the embeddings of live modules stay as they are")
    rows = _read(models, found)
    target = _target(models, rows, asked, has_base)
    names = [_vocabulary_tensors(model, own.size) for model, own in zip(models, rows, strict=True)]
    donor = _index(asked.source, models, has_base) if _is_letter(asked.source) else None
    nowhere = [t for t in target.rows.tokens if t not in target.given and not any(t in own.of for own in rows)]
    if nowhere:
        some = f"{shown(nowhere[0])}" + (f" and {len(nowhere) - 1} more" if len(nowhere) > 1 else "")
        found.notes.append(f"no model has a row for {some}; the result's rows are zero there")
    for i, (model, own) in enumerate(zip(models, rows, strict=True)):
        if own.of == target.rows.of and own.size == target.rows.size and not target.forced:
            continue
        found.models[i] = _in_order(i, models, rows, target, names, i if donor is None else donor)
        here, left = len(own.of.keys() & target.rows.of.keys()), len(own.of.keys() - target.rows.of.keys())
        found.notes.append(
            f"{here} of the {own.size} rows of {model.source} belong to tokens of the result, which has "
            f"{target.rows.size}" + (f"; {left} are left out" if left else "")
        )
    folder = target.folder
    if folder is not None and (target.files or any(m.is_folder and m.path != folder for m in models)):
        found.models = [_with_tokenizer(m, folder, target.files) for m in found.models]
        if models[0].path != folder:
            whose = next((m.source for m in models if m.path == folder), str(folder))
            found.notes.append(f"the tokenizer is that of {whose}")
    return found


def _is_letter(source: str) -> bool:
    return source == "base" or (len(source) == 1 and source in ascii_lowercase)


def _index(letter: str, models: Sequence[TensorSource], has_base: bool) -> int:
    """Which of the models, the base last, is meant."""
    found = len(models) - 1 if letter == "base" and has_base else -1
    if len(letter) == 1:
        found = ascii_lowercase.find(letter)
    if not 0 <= found < len(models):
        raise MergeidError(
            f"--tokenizer {letter!r} is not the letter of a model; expected union, a, b, …, base, or a folder with a "
            "tokenizer"
        )
    return found


def _read(models: Sequence[Checkpoint], found: OneVocabulary) -> list[Rows]:
    """Every model's rows. One without a tokenizer is taken to have the tokens of the first that has one."""
    sizes = [_size(model) for model in models]
    known = [vocabulary(model) for model in models]
    donor = next((i for i, tokens in enumerate(known) if tokens is not None), None)
    rows = []
    for model, size, own in zip(models, sizes, known, strict=True):
        if size is None:
            raise MergeidError(f"the config of {model.source} does not say how large its vocabulary is (vocab_size)")
        tokens = own
        if own is None and donor is not None:
            if not model.is_folder:
                raise MergeidError(f"{model.source} is not a folder; expected one with a tokenizer for --tokenizer")
            tokens = {t: row for t, row in (known[donor] or {}).items() if row < (sizes[donor] or 0)}
            if size <= max(tokens.values(), default=0):
                raise MergeidError(
                    f"{model.source} has no tokenizer that can be read, and {size} rows, fewer than the {len(tokens)} "
                    f"tokens of {models[donor].source}; put the tokenizer.json of {model.source} into its folder"
                )
            found.notes.append(
                f"{model.source} has no tokenizer that can be read; its rows are taken to be those of "
                f"{models[donor].source}"
            )
        rows.append(Rows.among(size, tokens))
    return rows


def _target(models: Sequence[Checkpoint], rows: Sequence[Rows], asked: Vocabulary, has_base: bool) -> Target:
    like = len(models) - 1 if has_base else None
    if asked.like is not None:
        like = _index(asked.like, models, has_base)
    extra: dict[str, Any] = {}
    place = Path(asked.source).expanduser()
    word = asked.source == "union" or _is_letter(asked.source)
    tokens = None if word else vocabulary_of(place)
    if tokens is not None:
        own, folder = Rows.among(max(tokens.values(), default=-1) + 1, tokens), place
    elif not word and place.is_dir():
        raise MergeidError(
            f"{place} has no tokenizer that can be read; expected tokenizer.json, vocab.json or vocab.txt"
        )
    else:
        if asked.source == "union":
            start, whole = _start(rows, like or 0)
            if not whole:
                extra = missing_from(rows[start].tokens, [(m, r.tokens) for m, r in zip(models, rows, strict=True)])
        else:
            start = _index(asked.source, models, has_base)
        own, folder = rows[start], _tokenizer_place(models, start)
    extra |= {t: {} for t in asked.tokens if t not in own.of and t not in extra}
    files: dict[str, str] = {}
    if extra:
        if not own.named or not models[0].is_folder:
            raise MergeidError(
                f"{models[0].source} is not a folder with a tokenizer, to which {shown(next(iter(extra)))} would be "
                "added; expected one, or a choice that adds no tokens (--tokenizer a, b)"
            )
        new, files = extended(folder, extra)
        own = Rows.among(max([own.size, *(row + 1 for row in new.values())]), {**own.tokens, **new})
    if asked.multiple is not None:
        own = own.rounded(asked.multiple)
    given = {t: _given(t, models, rows, asked, has_base) for t in asked.tokens}
    forced = frozenset(t for t, one in asked.tokens.items() if one.force)
    return Target(own, folder if own.named else None, files, like, given, forced)


def _tokenizer_place(models: Sequence[Checkpoint], start: int) -> Path:
    """Where a model's tokenizer lies, or that which is taken for it."""
    named = [m for m in (models[start], *models) if vocabulary(m) is not None]
    return named[0].tokenizer_folder if named else models[start].path


def _start(rows: Sequence[Rows], first: int) -> tuple[int, bool]:
    """The model whose tokenizer a union begins with, and whether it has every token of all."""
    named = any(own.named for own in rows)
    everything = {t for own in rows for t in (own.tokens if named else own.of)}
    order = [first, *(i for i in range(len(rows)) if i != first)]
    whole = next((i for i in order if everything <= rows[i].of.keys()), None)
    return (first, False) if whole is None else (whole, True)


def _given(
    token: str, models: Sequence[Checkpoint], rows: Sequence[Rows], asked: Vocabulary, has_base: bool
) -> tuple[int, int] | None:
    """The model and row that a token is said to be taken from; None: zeros."""
    told = asked.tokens[token]
    if told.model is None:
        return None
    at = _index(told.model, models, has_base)
    wanted = token if told.token is None else told.token
    row = wanted if isinstance(wanted, int) else rows[at].of.get(wanted)
    if row is None or not 0 <= row < rows[at].size:
        raise MergeidError(
            f"the row of token {shown(token)} is to be that of {shown(wanted)} in {models[at].source}, which has no "
            f"such token among its {rows[at].size}; expected one that it has"
        )
    return at, row


def _with_tokenizer(model: Checkpoint, place: Path, files: Mapping[str, str]) -> Checkpoint:
    if model.path != place:
        if not isinstance(model, Derived):
            formed = {name: read_from(model, name) for name in model.table}
            model = derived(model.source, model, formed, parents=[model])
        assert isinstance(model, Derived)
        model = replace(model, tokenizer=place)
    return replace(model, beside={**model.beside, **files})


def _in_order(
    at: int, models: Sequence[Checkpoint], rows: Sequence[Rows], target: Target, names: Sequence[set[str]], donor: int
) -> Derived:
    """One model with its rows where the target has their tokens, and its special tokens (or the donor's) by their new
    numbers."""
    model = models[at]
    formed = {name: read_from(model, name) for name in model.table}
    for name in names[at]:
        if not all(name in other for other in names):
            raise MergeidError(
                f"tensor {name!r} has one row per token only in {model.source}; expected the same in all models"
            )
        formed[name] = reordered(at, name, models, rows, target)
    config, files = renumbered(model, rows[at], models[donor], rows[donor], target.rows)
    found = derived(model.source, model, formed, parents=[model], config=config)
    return replace(found, beside={**model.beside, **files})


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
