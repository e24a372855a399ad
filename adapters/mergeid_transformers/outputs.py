"""Which of the tensors that a transformers model returns are its interface, and which are by-products."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mergeid_transformers.tasks import OUTPUT_FIELDS

CACHES = re.compile(r"(past_|present_|.*cache).*|mems|state|.*_states_cache")
ATTENTIONS = re.compile(r"(.*_)?attentions")
LAYERS = re.compile(r"((encoder|decoder|reshaped|generator)_)?hidden_states")
"""Of every layer: returned on request."""
HIDDEN = re.compile(r"(.*_)?hidden_states?")
PART = re.compile(r".*_outputs?")
"""A whole output of a sub-model, with fields of its own."""
OWN = frozenset(OUTPUT_FIELDS) - {f for f in OUTPUT_FIELDS if HIDDEN.fullmatch(f)} - {"pooler_output", "feature_maps"}


def interface(names: Sequence[str]) -> list[str]:
    """Names of the outputs that somebody reads, in their order.

    Left out are caches, attentions, hidden states of all layers, whole outputs of sub-models, and, beside a task's own
    outputs (logits, boxes, embeddings), hidden states of any other kind. A model without a task returns its hidden
    states for their own sake: there they count, those of an encoder too.

    Args:
        names: of all tensors that were returned, ``"logits"``, ``"vision_model_output.last_hidden_state"``.
    """
    kept = [n for n in names if not _is_by_product(n)]
    own = any(_field(n) in OWN for n in kept)
    return [n for n in kept if not (own and HIDDEN.fullmatch(_field(n)))]


def _field(name: str) -> str:
    return name.partition(".")[0]


def _is_by_product(name: str) -> bool:
    field, dot, rest = name.partition(".")
    if any(kind.fullmatch(field) for kind in (CACHES, ATTENTIONS, LAYERS)):
        return True
    return bool(dot) and PART.fullmatch(field) is not None and not rest.split(".")[0].isdigit()
