"""Tensors that the library converts on loading: experts that it stacks, projections that it splits, layouts that it
turns."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mergeid.plugins import Conversion, TensorTable

if TYPE_CHECKING:
    from torch import Tensor


def conversions(model: Any, table: TensorTable) -> list[Conversion]:
    """By the library's own rules; only those whose result fits the network's tensors."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            apply_renamings,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError:  # transformers 4 loads tensors as they lie in files
        return []
    rules = get_model_conversion_mapping(model)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    if not converters:
        return []
    rule_of = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    groups: dict[tuple[int, str], list[tuple[str, str, str]]] = {}
    for name in sorted(table, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if pattern is not None and not (key not in state and name in state):
            called = apply_renamings(name, renamings)
            groups.setdefault((converters.index(rule_of[pattern]), key), []).append((name, pattern, called))
    found = []
    for (number, key), parts in groups.items():
        rule = converters[number]
        load = partial(_load, model, rule, key, parts)
        try:
            made = load({n: torch.empty(table[n].shape, device="meta") for n, *_ in parts})
        except Exception:  # operations raise kinds of their own on what they were not made for
            continue
        if not made or any(k not in state or state[k].shape != t.shape for k, t in made.items()):
            continue
        order = [name for name, _, called in sorted(parts, key=lambda part: dot_natural_key(part[2]))]
        save = partial(_save, model, rule, tuple(made), order)
        found.append(Conversion(tuple(name for name, *_ in parts), tuple(made), load, save))
    return found


def _load(
    model: Any, rule: Any, key: str, parts: list[tuple[str, str, str]], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Args:
    key: the network's first tensor.
    parts: name in the file, the rule's pattern that it fits, name after all renaming.
    """
    working = copy.deepcopy(rule)
    for name, pattern, _ in parts:
        working.add_tensor(key, name, pattern, tensors[name])
    return {k: _alone(t) for k, t in working.convert(key, model=model, config=model.config).items()}


def _save(
    model: Any, rule: Any, keys: tuple[str, ...], names: list[str], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Args:
    names: in the file, in the order of their names after all renaming.
    """
    from transformers.core_model_loading import dot_natural_key

    back, first = rule.reverse_transform(), ""
    for key in sorted(keys, key=dot_natural_key):
        renamed, pattern = back.rename_source_key(key)
        first = first or renamed
        back.add_tensor(renamed, key, pattern, tensors[key])
    made = back.convert(first, model=model, config=model.config)
    return {name: _alone(made[told]) for name, told in zip(names, sorted(made, key=dot_natural_key), strict=True)}


def _alone(found: Any) -> Tensor:
    tensor: Tensor = found[0] if isinstance(found, list) else found
    return tensor
