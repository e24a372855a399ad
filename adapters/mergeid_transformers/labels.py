"""Human labels for spaces, made from the names of the tensors that a space lives on."""

from __future__ import annotations

import re
from collections.abc import Iterable

NUMBERED = re.compile(
    r"^(?P<place>.*?\b(?:layers?|h|blocks?|block|stages?)\.\d+(?:\.(?:blocks?|layers?)\.\d+)*)\.(?P<rest>.+)$"
)
# Which part of a layer a tensor belongs to: first match wins.
PARTS = (
    ("attention queries and keys", re.compile(r"(\bq_proj|\bk_proj|query|\bkey\b|q_lin|k_lin|Attention\.[qk])\b")),
    ("attention values", re.compile(r"(\bv_proj|\bvalue|v_lin|Attention\.v)\b")),
    ("attention heads", re.compile(r"(attn|attention|c_attn|qkv)", re.IGNORECASE)),
    ("MLP hidden", re.compile(r"(mlp|ffn|feed_forward|intermediate|DenseReluDense|fc1|fc2|lin1|lin2|c_fc)")),
)
RESIDUAL = re.compile(r"(embed|wte|wpe|embeddings|shared|norm|layernorm|ln_|layer_norm)", re.IGNORECASE)


def space_label(axes: Iterable[tuple[str, int]]) -> str | None:
    """A label for the space on these (tensor, axis) pairs, None where the names tell nothing.

    A space that runs through several layers is a residual stream (named after its tower, if there are several); a
    space inside one layer is named after the layer and the part of it.
    """
    names = sorted({name for name, _ in axes})
    if not names:
        return None
    places = {m["place"] for n in names if (m := NUMBERED.match(n)) is not None}
    if len(places) > 1 or (not places and any(RESIDUAL.search(n) for n in names)):
        return _tower(names, places)
    if not places:
        return f"{_common(names)} output" if _common(names) else None
    place = next(iter(places))
    rests = [m["rest"] for n in names if (m := NUMBERED.match(n)) is not None]
    return f"{_readable(place)} {_part(rests)}"


def _part(rests: list[str]) -> str:
    found = [next((label for label, pattern in PARTS if pattern.search(rest)), None) for rest in rests]
    for label, _ in PARTS:
        if label in found:
            return "attention heads" if label.startswith("attention") and _several(found) else label
    return f"{rests[0].rsplit('.', 1)[0]} output"


def _several(found: list[str | None]) -> bool:
    return len({f for f in found if f is not None and f.startswith("attention ")} - {"attention heads"}) > 1


def _readable(place: str) -> str:
    words = place.split(".")
    keep = [w for w in words if w not in ("model", "transformer", "bert", "base_model")]
    return ".".join(keep)


def _common(names: list[str]) -> str:
    stems = [n.rpartition(".")[0] for n in names]
    return stems[0] if len(set(stems)) == 1 else ""


def _tower(names: list[str], places: set[str]) -> str:
    towers = {t for n in names if (t := _tower_of(n)) is not None}
    return f"{towers.pop()} residual stream" if len(towers) == 1 else "residual stream"


def _tower_of(name: str) -> str | None:
    for tower in ("vision_model", "vision_tower", "text_model", "encoder", "decoder", "language_model"):
        if name.startswith(f"{tower}.") or f".{tower}." in name:
            return tower.removesuffix("_model").removesuffix("_tower")
    return None
