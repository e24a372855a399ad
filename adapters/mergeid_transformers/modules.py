"""The parts of models, by the names that mergekit has for them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_SEEING = (
    ("multi_modal_projector", r"(^|\.)(multi_modal_projector\.|visual\.(deepstack_)?merger)"),
    ("vision_tower", r"(^|\.)(vision_tower|visual)\."),
    ("text_decoder", r""),
)
_PARTS: dict[str, tuple[tuple[str, str], ...]] = {
    "t5": (("encoder", r"^encoder\."), ("decoder", r"^decoder\."), ("shared", r"")),
    "whisper": (("encoder", r"(^|\.)encoder\."), ("decoder", r"")),
    "llama4": (_SEEING[0], ("vision_model", r"(^|\.)vision_model\."), _SEEING[2]),
    **dict.fromkeys(("gemma3", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), _SEEING),
}
"""Type of a model -> its parts and what the names of their tensors look like; the first that fits counts."""


def modules(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str] | None:
    """Tensor -> the part that it belongs to; None where the model has one part alone."""
    parts = _PARTS.get(str(config.get("model_type")))
    if parts is None:
        return None
    return {name: next(part for part, pattern in parts if re.search(pattern, name)) for name in names}
