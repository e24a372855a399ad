"""A base as an adapter's trainer saw it: with the head of another task, or rows for tokens that were added, where the
adapter holds these whole; and with the tokenizer that lies beside the adapter."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mergeid.errors import MergeidWarning
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.companions import label_map, vocabulary, vocabulary_of
from mergeid.io.derived import Derived, Formed, derived, read_from
from mergeid.io.lora_places import base_ties
from mergeid.io.networks import Network, network_of
from mergeid.io.tensors import TensorSource
from mergeid.plugins import NamesTasks, SetsClasses, TensorInfo, adapter_names, get_adapter

Shapes = Mapping[str, tuple[int, ...]]


class Grown(Derived):
    """A base with rows for tokens that were added."""


def as_trained(base: Checkpoint, adapter: TensorSource, whole: Mapping[str, str], task: str | None) -> Checkpoint:
    """The base with a place for each tensor that the adapter holds whole; the base itself where it has them all, or
    where nothing says what the network of base and adapter is.

    Args:
        whole: name without what PEFT puts before it -> name in the adapter.
        task: what PEFT calls the adapter's task (``"SEQ_CLS"``), or the class that it was trained in.
    """
    shapes = {short: adapter.table[name].shape for short, name in whole.items()}
    places = {short: _place(base, short) for short in shapes}
    if None in places.values() and (network := network_of(base)) is not None:
        for short in (s for s, place in places.items() if place is None):
            key = network.key_of(short)
            if key in network.stacked:
                return base
            places[short] = None if key is None else network.name_of(key)
    other = {s: shapes[s] for s, place in places.items() if place is None or base.table[place].shape != shapes[s]}
    if not other or base.config is None:
        return base
    held = {place: other[s] for s, place in places.items() if s in other and place is not None}
    found = _with_tokens(base, held, [other[s] for s in other if places[s] is None])
    return found or (_with_head(base, other, task) if task is not None else None) or base


def tokenizer_beside(base: Checkpoint, folder: Path) -> Path | None:
    """An adapter's folder where it holds the tokenizer that the adapter was trained with, for this base; None: the
    base's counts. A warning says so where the adapter has one with other tokens, for which there may be no rows."""
    own = vocabulary_of(folder) if base.is_folder else None
    if own is None:
        return None
    theirs = vocabulary(base)
    if own == theirs or isinstance(base, Grown) or (theirs is None and max(own.values(), default=0) < _rows(base)):
        return folder
    if theirs is not None:
        warnings.warn(
            f"{folder} has a tokenizer with other tokens than {base.source}, whose tokenizer is used",
            MergeidWarning,
            stacklevel=3,
        )
    return None


def _place(base: TensorSource, short: str) -> str | None:
    if short in base.table:
        return short
    ends = [n for n in base.table if n.endswith(f".{short}") or short.endswith(f".{n}")]
    return ends[0] if len(ends) == 1 else None


def _rows(base: TensorSource) -> int:
    """How many tokens the config has room for; 0: it does not say."""
    config: dict[str, Any] = base.config or {}
    nested = config.get("text_config")
    found = config.get("vocab_size") or (nested.get("vocab_size") if isinstance(nested, dict) else None)
    return found if isinstance(found, int) else 0


def _with_tokens(base: Checkpoint, shapes: Shapes, more: Sequence[tuple[int, ...]]) -> Checkpoint | None:
    """With more rows for tokens; None: it is not all tensors with a row per token that have more, or others too.

    Args:
        shapes: of what the base has in another size.
        more: of what it does not have: a tied head.
    """
    outside = {n: info.shape for n, info in base.table.items() if not any(p.isdigit() for p in n.split("."))}
    wide = {n for n, shape in outside.items() if shape[:1] == (_rows(base),)}
    sizes = {shape[0] for shape in shapes.values() if shape}
    alike = all(shape[1:] == base.table[n].shape[1:] for n, shape in shapes.items())
    alike = alike and (not more or (base_ties(base) and set(more) <= set(shapes.values())))
    if shapes.keys() != wide or len(sizes) != 1 or not alike:
        return None
    config, (size,) = dict(base.config or {}), sizes
    if "vocab_size" in config:
        config["vocab_size"] = size
    if isinstance(nested := config.get("text_config"), dict) and "vocab_size" in nested:
        config["text_config"] = {**nested, "vocab_size": size}
    found = _holding(base, {n: n for n in base.table}, shapes, config)
    return Grown(**{f.name: getattr(found, f.name) for f in fields(found)})


def _with_head(base: Checkpoint, shapes: Shapes, task: str) -> Checkpoint | None:
    """With the head of a task; None: no class of the base's library has these tensors, or it has more that lie
    nowhere."""
    for name in adapter_names():
        library = get_adapter(name)
        config = library.config_for(base.config or {}, task) if isinstance(library, NamesTasks) else None
        if config is None or not isinstance(library, SetsClasses):
            continue
        kept = {n: info for n, info in base.table.items() if n not in shapes}
        for classes in dict.fromkeys(shape[0] for shape in shapes.values() if shape):
            labels = label_map(config) or {}
            told = config if len(labels) == classes else library.config_with_classes(config, classes, None)
            table = {**kept, **{s: TensorInfo("F32", shape) for s, shape in shapes.items()}}
            network = network_of(replace(base, config=told, table=table))
            if network is not None and _complete(network, shapes):
                return _holding(base, _prefixed(network, [n for n in kept if n in network.keys]), shapes, told)
    return None


def _complete(network: Network, shapes: Shapes) -> bool:
    """Whether the network has these tensors, and none that lies nowhere."""
    there = {*network.keys.values(), *network.stacked}
    there |= {key for key, others in network.tied.items() if others & there}
    placed = {short: network.key_of(short) for short in shapes}
    fits = all(key is not None and network.shapes.get(key) == shapes[short] for short, key in placed.items())
    return fits and network.shapes.keys() <= there


def _prefixed(network: Network, names: Sequence[str]) -> dict[str, str]:
    """New name -> name of what is kept. A model without a head has no prefix in its files, one with a head has."""
    begins = {network.keys[n].partition(".")[0] for n in names}
    begin = f"{begins.pop()}." if len(begins) == 1 else ""
    apart = begin and not any(n.startswith(begin) for n in names)
    return {f"{begin}{n}" if apart else n: n for n in names}


def _holding(base: Checkpoint, names: Mapping[str, str], shapes: Shapes, config: dict[str, Any]) -> Derived:
    """The base's tensors under new names, and places of these shapes, which the adapter fills."""
    dtype = Counter(info.dtype for info in base.table.values()).most_common(1)[0][0]
    formed = {new: read_from(base, old) for new, old in names.items()}
    for name, shape in shapes.items():
        info = TensorInfo(base.table[name].dtype if name in base.table else dtype, shape)
        formed[name] = Formed(info, _unfilled, (), "of the adapter")
    return derived(base.source, base, formed, parents=[base], config=config)


def _unfilled() -> Any:
    raise AssertionError("a place that the adapter was to fill")
