"""Output heads that are the embedding itself in some models and tensors of their own in others.

A tied head may be missing from a file, or lie there as a copy. Before models are compared tensor by tensor all are
given the same heads: copies are left out where every model ties, and a tied head becomes a tensor of its own where any
model has its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from mergeid.errors import MergeidError
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.tensors import TensorSource
from mergeid.plugins import Adapter, ComparesConfigs, TiesWeights, adapter_names, get_adapter

PIECE = 16 << 20
"""Bytes that are compared at a time."""


@dataclass
class SameHeads:
    """Models with the same heads.

    Attributes:
        models: in the order given; the tables and configs of some may have changed.
        dropped: copies of embeddings that were left out.
        notes: what the user should know.
    """

    models: list[Checkpoint]
    dropped: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def same_heads(models: Sequence[Checkpoint], skip: Sequence[str] = ()) -> SameHeads:
    """Give all models the same heads.

    Args:
        models: all that meet, the base too.
        skip: globs of tensors that stay the first model's; a tied model has no head to keep.

    Raises:
        MergeidError: a config ties a head whose tensor is not the embedding, or a head cannot be untied.
    """
    found = SameHeads(list(models))
    adapter = _adapter(models)
    if adapter is None or not _suspicious(models):
        return found
    live = [not c.files for c in models]
    if all(live) and all(_stated(c.config) == _stated(models[0].config) for c in models):
        return found
    tied = [adapter.ties(c.config or {}) for c in models]
    if None in tied or not any(tied):
        return found
    for copy, source in _copies(adapter, models):
        kinds = [_kind(c, bool(t), copy, source) for c, t in zip(found.models, tied, strict=True)]
        skipped = any(fnmatchcase(copy, pattern) for pattern in skip)
        if "missing" in kinds:
            continue
        if any(live) and "own" in kinds and len(set(kinds)) > 1:
            one, two = (models[kinds.index(k)].source for k in ("own", next(k for k in kinds if k != "own")))
            raise MergeidError(
                f"{copy} of the {one} is a separate tensor and that of the {two} is {source}; expected both live "
                f"modules to tie them, or neither: untie the second before merging"
            )
        if "own" in kinds and not skipped:
            found.models = [_untied(adapter, c, k, copy, source) for c, k in zip(found.models, kinds, strict=True)]
            names = ", ".join(c.source for c, k in zip(models, kinds, strict=True) if k != "own")
            if any(k != "own" for k in kinds):
                found.notes.append(
                    f"{copy} of {names} is {source}, to which it is tied; the result has a separate head"
                )
        elif "copy" in kinds:
            for c in [c for c, k in zip(models, kinds, strict=True) if k == "copy"]:
                found.notes.append(
                    f"{copy} of {c.source} is left out: it is a copy of {source}, to which its config ties it"
                )
            found.models = [_without(c, copy) if k == "copy" else c for c, k in zip(found.models, kinds, strict=True)]
            found.dropped.add(copy)
    return found


def _adapter(models: Sequence[TensorSource]) -> Any:
    """The adapter that understands the configs of all models (an `Adapter` and `TiesWeights`); None: there is none."""
    for name in adapter_names():
        adapter = get_adapter(name)
        if not (isinstance(adapter, TiesWeights) and isinstance(adapter, ComparesConfigs)):
            continue
        if all(c.config is not None and adapter.described(c.config, {}) is not None for c in models):
            return adapter
    return None


def _suspicious(models: Sequence[TensorSource]) -> bool:
    """Whether heads may differ at all: other names, other settings, or a matrix that may copy the embedding."""
    first = models[0]
    for other in models[1:]:
        if other.table.keys() != first.table.keys() or _stated(other.config) != _stated(first.config):
            return True
    for c in models:
        if True not in _stated(c.config):
            continue
        shapes = [info.shape for info in c.table.values() if len(info.shape) == 2]
        sizes = _vocabularies(c.config or {})
        if any(shape[0] in sizes and shapes.count(shape) > 1 for shape in set(shapes)):
            return True
    return False


def _stated(config: Mapping[str, Any] | None) -> list[Any]:
    """All values that the config gives its ties, outermost first."""
    values = [config["tie_word_embeddings"]] if config and "tie_word_embeddings" in config else []
    for part in (config or {}).values():
        values += _stated(part) if isinstance(part, Mapping) else []
    return values


def _vocabularies(config: Mapping[str, Any]) -> set[Any]:
    found = {config["vocab_size"]} if isinstance(config.get("vocab_size"), int) else set()
    for part in config.values():
        found |= _vocabularies(part) if isinstance(part, Mapping) else set()
    return found


def _copies(adapter: Any, models: Sequence[TensorSource]) -> Iterator[tuple[str, str]]:
    """(head, embedding) by their names in the files, for heads that ties make one with the embedding."""
    union = {name: info for c in reversed(models) for name, info in c.table.items()}
    own: Adapter = adapter
    for c in models:
        config = adapter.with_ties(c.config, True)
        if config is None:
            continue
        try:
            arch = own.recognise(union, config, c.metadata)
            model = own.build(arch, device="meta") if arch is not None else None
        except MergeidError:  # code that the library does not have: nothing is known of its ties
            continue
        if arch is None or model is None:
            continue
        from mergeid.basics.aliases import tied_groups

        names = {key: name for name, key in own.tensor_names(arch, model, union).items()}
        named = [[names[key] for key in group if key in names] for group in tied_groups(model)]
        groups = [group for group in named if len(group) > 1]
        for group in groups:
            source = next((n for n in group if all(n in other.table for other in models)), None)
            yield from ((n, source) for n in group if source is not None and n != source)
        if groups:
            return


def _kind(c: TensorSource, tied: bool, copy: str, source: str) -> str:
    """ "tied": no tensor; "copy": the embedding again; "own": another; "missing": neither tied nor there."""
    if copy not in c.table:
        return "tied" if tied else "missing"
    if not tied:
        return "own"
    if not _equal(c, copy, source):
        raise MergeidError(
            f"config.json of {c.source} ties {copy} to {source} (tie_word_embeddings), but the file holds another "
            f"{copy}, so it is not clear which one counts; remove the tensor from the file, or set "
            "tie_word_embeddings to false"
        )
    return "copy"


def _equal(c: TensorSource, one: str, two: str) -> bool:
    if c.table[one] != c.table[two]:
        return False
    if not c.mapped:
        import torch

        return torch.equal(c.tensor(one), c.tensor(two))
    x, y = c.raw(one), c.raw(two)
    return all(x[i : i + PIECE] == y[i : i + PIECE] for i in range(0, len(x), PIECE))


def _untied(adapter: TiesWeights, c: Checkpoint, kind: str, copy: str, source: str) -> Checkpoint:
    """The same model with its head as a tensor of its own."""
    if kind == "own":
        return c
    config = adapter.with_ties(c.config or {}, False)
    if config is None:
        raise MergeidError(
            f"{c.source} ties {copy} to {source}, which its config cannot undo, and another model has a separate "
            f"{copy}; expected the same in all models"
        )
    c = replace(c, config=config, config_changed=True)
    return c if kind == "copy" else c.with_alias(copy, source)


def _without(c: Checkpoint, name: str) -> Checkpoint:
    return replace(c, table={n: info for n, info in c.table.items() if n != name})
