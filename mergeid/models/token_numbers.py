"""Special tokens that configs name by their numbers, which change with the vocabulary."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mergeid.basics.reading import json_text, read_table
from mergeid.io.checkpoint import Checkpoint
from mergeid.models.token_rows import Rows

GENERATION = "generation_config.json"
_NUMBERED = re.compile(r"_token_(id|ids|index)$|^(begin_)?suppress_tokens$")


def renumbered(
    model: Checkpoint, own: Rows, donor: Checkpoint, theirs: Rows, new: Rows
) -> tuple[dict[str, Any], dict[str, str]]:
    """A model's config and other files that change, for another vocabulary.

    Args:
        own: the rows of the model.
        donor: whose special tokens count; the model itself where each keeps its own.
        theirs: the donor's rows.
        new: those of the result.
    """

    def told(mine: Mapping[str, Any], other: Any) -> dict[str, Any]:
        found = dict(mine)
        for key in filter(_NUMBERED.search, mine):
            given = isinstance(other, dict) and key in other
            found[key] = _moved(other[key], theirs, new) if given else _moved(mine[key], own, new)
        if "vocab_size" in mine:
            found["vocab_size"] = new.size
        return found

    config, other = model.config or {}, donor.config or {}
    changed = told(config, other)
    nested = config.get("text_config")
    if isinstance(nested, dict):
        changed["text_config"] = told(nested, other.get("text_config"))
    place = model.path / GENERATION
    if not model.is_folder or not place.is_file():
        return changed, {}
    said = read_table(place, "settings of generation")
    beside = donor.path / GENERATION
    text = told(said, read_table(beside, "settings of generation") if beside.is_file() else None)
    return changed, {GENERATION: json_text(text) + "\n"}


def _moved(value: Any, old: Rows, new: Rows) -> Any:
    """Numbers of tokens, one or a list, as they are in the new rows; None: the token is left out. What names no row
    stays."""
    if isinstance(value, list):
        return [n for n in (_moved(one, old, new) for one in value) if n is not None]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < old.size:
        return value
    token = old.at.get(value)
    return new.of.get(token) if token is not None else None
