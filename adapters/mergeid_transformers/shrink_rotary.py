"""Rotary parameters of a narrower head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergeid_transformers.shrink_layers import integer, integers
from mergeid_transformers.shrink_table import SECTIONS


def adapt_rotary(model_type: str, own: Mapping[str, Any], content: dict[str, Any]) -> None:
    """Rotary parameters of the new head size, in place."""
    heads = content.get("num_attention_heads") or content.get("n_head") or content.get("num_heads")
    hidden = content.get("hidden_size") or content.get("d_model") or content.get("n_embd")
    size = content.get("head_dim") or (hidden // heads if integer(hidden) and integer(heads) and heads else None)
    size = content.get("qk_rope_head_dim") or size
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(own.get(name), Mapping) and size:
            rope = dict(own[name])
            if model_type in SECTIONS:
                rope.setdefault("mrope_section", SECTIONS[model_type])
            content[name] = _sections(rope, int(size * float(own.get("partial_rotary_factor") or 1.0)))


def _sections(rope: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Rotary parameters whose sections and factors fit `size` rotated dimensions."""
    new = dict(rope)
    for name, value in rope.items():
        if isinstance(value, Mapping):
            new[name] = _sections(value, size)
    size = int(size * float(rope.get("partial_rotary_factor") or 1.0))
    pairs = size // 2
    for name in ("short_factor", "long_factor"):
        if isinstance(rope.get(name), (list, tuple)):
            new[name] = list(rope[name])[:pairs]
    old = rope.get("mrope_section")
    if integers(old):
        parts = [pairs * v // sum(old) for v in old]
        parts[old.index(min(old))] += pairs - sum(parts)
        new["mrope_section"] = parts
    return new
