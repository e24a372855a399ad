"""What recipes say of parameters, as settings of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergeid.io.recipe_schema import ConditionEntry
from mergeid.methods.settings import Condition

Table = dict[str, Any]
"""What a recipe says at one place: name of a parameter -> its setting (words among them are refused later)."""


def settings_of(given: Mapping[str, Any] | None) -> Table:
    """Settings as the methods take them: scalars, tuples of numbers (gradients), tuples of `Condition`."""
    return {key: _setting(value) for key, value in (given or {}).items()}


def _setting(value: Any) -> Any:
    entries = value if isinstance(value, list) else [value]
    if isinstance(entries[0], ConditionEntry):
        return tuple(_condition(entry) for entry in entries)
    return tuple(value) if isinstance(value, list) else value


def _condition(entry: ConditionEntry) -> Condition:
    everywhere = entry.filter is None or entry.filter == "*"
    pattern = "*" if everywhere else f"*{_literally(str(entry.filter))}*"
    return Condition(_setting(entry.value), pattern, False)


def _literally(text: str) -> str:
    """A glob that matches this text and nothing else."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def joined(levels: Sequence[Any]) -> Any:
    """Settings of falling precedence as one."""
    conditions: list[Condition] = []
    for level in levels:
        if not (isinstance(level, tuple) and level and isinstance(level[0], Condition)):
            if not conditions:
                return level
            return (*conditions, Condition(level, "*", False))
        conditions += level
    return tuple(conditions)


def complement(setting: Any) -> Any:
    """1 minus a setting."""
    if isinstance(setting, tuple):
        return tuple(complement(s) for s in setting)
    if isinstance(setting, Condition):
        return Condition(complement(setting.value), setting.pattern, setting.required)
    return 1 - setting


def words_in(setting: Any) -> list[str]:
    """The words among the values of a setting, where nearly always numbers stand."""
    if isinstance(setting, Condition):
        return words_in(setting.value)
    if isinstance(setting, (tuple, list)):
        return [word for part in setting for word in words_in(part)]
    return [setting] if isinstance(setting, str) else []


def shared(levels: Sequence[Table]) -> Table:
    """Tables of falling precedence as one."""
    keys = {key for level in levels for key in level}
    return {key: joined([level[key] for level in levels if key in level]) for key in keys}
