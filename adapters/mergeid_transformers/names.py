"""Which tensor of a checkpoint is which tensor of the built model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# Prefixes that training wrappers put before every name.
WRAPPERS = ("module.", "_orig_mod.")

Renaming = Callable[[str], "str | None"]


def tensor_names(model: nn.Module, table: Iterable[str]) -> dict[str, str]:
    """Checkpoint tensor name -> key of ``model.state_dict()``, for the tensors that correspond one to one.

    Names differ where a head was added or taken off (base-model prefix), in old files (LayerNorm ``gamma`` and
    ``beta``) and where the library renamed its modules since (its own renaming rules are asked). Left out are
    tensors that the model does not have (old ``position_ids`` and mask buffers, another head) and tensors that
    the library *converts* on loading (experts that it stacks, projections that it splits): these have no single
    counterpart, so they cannot be permuted by name.
    """
    keys = set(model.state_dict())
    rename = _library_renaming(model)
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in table:
        key = _key_of(name, keys, rename, prefix)
        if key is not None and key not in taken:
            found[name] = key
            taken.add(key)
    return found


def computed(model: Any, missing: Iterable[str]) -> list[str]:
    """Of the keys that a file lacks those that the library does not look for there: what it leaves out when it saves,
    or has the right value for (sinusoidal positions, a bias of zeros)."""
    patterns: list[str] = []
    for module in model.modules():
        for field in ("_keys_to_ignore_on_save", "_keys_to_ignore_on_load_missing"):
            patterns.extend(getattr(module, field, None) or ())
    return [key for key in missing if any(re.search(p, key) for p in patterns)]


def _key_of(name: str, keys: set[str], rename: Renaming, prefix: str) -> str | None:
    for bare in _unwrapped(name):
        new = rename(bare)
        if new is None:
            return None
        for candidate in (new, bare, _old_norm_name(new)):
            for form in _prefixed(candidate, prefix):
                if form in keys:
                    return form
    return None


def _unwrapped(name: str) -> list[str]:
    return [name, *(name.removeprefix(w) for w in WRAPPERS if name.startswith(w))]


def _prefixed(name: str, prefix: str) -> list[str]:
    if not prefix:
        return [name]
    return [name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"]


def _old_norm_name(name: str) -> str:
    stem, _, last = name.rpartition(".")
    return f"{stem}.{ {'gamma': 'weight', 'beta': 'bias'}.get(last, last) }"


def _library_renaming(model: Any) -> Renaming:
    """The library's own renaming of old checkpoint names; None as a result: converted, not renamed."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # transformers 4: names are as saved, but for a table of regular expressions
        return _regular_expressions(getattr(model, "_checkpoint_conversion_mapping", None) or {})
    rules = get_model_conversion_mapping(model)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    state = model.state_dict()

    def rename(name: str) -> str | None:
        new, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if new not in state and name in state:
            return name
        return None if converter is not None else new

    return rename


def stacked(model: Any, table: Iterable[str]) -> dict[str, list[list[str]]]:
    """Key of ``model.state_dict()`` -> the tensors of the experts that the library stacks into it (axis 0) and joins
    (axis 1), one list for each kind of weight; by its own conversion rules."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # transformers 4 keeps experts as they lie in files
        return {}
    rules = get_model_conversion_mapping(model)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter) and _stacks(r)]
    state, prefix = model.state_dict(), model.base_model_prefix
    order = {pattern: i for rule in converters for i, pattern in enumerate(rule.source_patterns)}
    kinds = {pattern: len(rule.source_patterns) for rule in converters for pattern in rule.source_patterns}
    found: dict[str, list[dict[int, str]]] = {}
    for name in table:
        key, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if pattern is None or pattern not in order or key not in state:
            continue
        number = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), name)
        if number is not None:
            parts = found.setdefault(key, [{} for _ in range(kinds[pattern])])
            parts[order[pattern]][int(number[1])] = name
    return {
        key: [[experts[i] for i in range(len(experts))] for experts in parts]
        for key, parts in found.items()
        if all(sorted(experts) == list(range(len(parts[0]))) for experts in parts)
    }


def _stacks(rule: Any) -> bool:
    """Whether a rule stacks experts, and joins their kinds, and does nothing else."""
    done = [(type(o).__name__, getattr(o, "dim", None)) for o in rule.operations]
    several = len(rule.source_patterns) > 1
    return done == [("MergeModulelist", 0), ("Concatenate", 1)][: 2 if several else 1]


def _regular_expressions(mapping: dict[str, str]) -> Renaming:
    def rename(name: str) -> str:
        for pattern, new in mapping.items():
            changed, count = re.subn(pattern, new.lstrip("^").replace("(.+)", r"\1"), name)
            if count:
                return changed
        return name

    return rename
