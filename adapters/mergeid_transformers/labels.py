"""Human labels for spaces, made from the names of the tensors that a space lives on."""

from __future__ import annotations

import re
from collections.abc import Iterable

NUMBERED = re.compile(
    r"^(?P<place>.*?\b(?:layers?|h|blocks?|block|stages?)\.\d+(?:\.(?:blocks?|layers?)\.\d+)*)\.(?P<rest>.+)$"
)
# Which part of a layer a tensor belongs to: first match wins.
QUERIES = re.compile(r"(\bq_proj|query|q_lin|Attention\.q)\b")
KEYS = re.compile(r"(\bk_proj|\bkey|k_lin|Attention\.k)\b")
FUSED = re.compile(r"(c_attn|qkv|query_key_value|Wqkv|W_pack)")
VALUES = re.compile(r"(\bv_proj|\bvalue|v_lin|Attention\.v)\b")
OUTPUT = re.compile(
    r"(attn\w*\.(c_proj|out_proj|o_proj|dense|proj)|attention\.(dense|out_lin|output\.dense)|Attention\.o)\b"
)
ATTENTION = re.compile(r"(attn|attention)", re.IGNORECASE)
MLP = re.compile(r"(mlp|ffn|feed_forward|intermediate|DenseReluDense|fc1|fc2|lin1|lin2|c_fc|dense_h_to_4h)")
NORM = re.compile(r"(norm|ln|LayerNorm)\w*\.(weight|bias)$", re.IGNORECASE)
TOWERS = {"vision_model": "vision", "vision_tower": "vision", "visual": "vision", "text_model": "text",
          "language_model": "language", "encoder": "encoder", "decoder": "decoder"}  # fmt: skip


def space_label(axes: Iterable[tuple[str, int]]) -> str | None:
    """A label for the space on these (tensor, axis) pairs, None where the names tell nothing.

    A space that is written to from several layers is a residual stream (named after its tower, if there are several);
    one inside a layer is named after the layer and the part of it. A pair that is given twice belongs to several spaces
    that share their blocks: attention heads.
    """
    pairs = sorted(axes)
    if not pairs:
        return None
    several = len(set(pairs)) < len(pairs)
    names = sorted({n for n, _ in pairs})
    places = {m["place"] for n in names if (m := NUMBERED.match(n)) is not None}
    outside = [n for n in names if NUMBERED.match(n) is None and not NORM.search(n)]
    if len(places) > 1 or (places and outside):
        return _tower([n for n, axis in pairs if axis == 0] or names)
    if not places:
        module = (outside or names)[0]
        return module.rpartition(".")[0] or module
    rests = [m["rest"] for n in names if (m := NUMBERED.match(n)) is not None]
    return f"{_readable(next(iter(places)))} {_part(rests, several)}"


def _part(rests: list[str], several: bool) -> str:
    def has(pattern: re.Pattern[str]) -> bool:
        return any(pattern.search(r) for r in rests)

    if not has(ATTENTION) and has(MLP):
        return "MLP hidden"
    kinds = {"queries": has(QUERIES), "keys": has(KEYS), "values": has(VALUES)}
    named = [k for k, found in kinds.items() if found]
    if several or (kinds["values"] and len(named) > 1):
        return "attention heads"
    if named:
        return f"attention {' and '.join(named)}"
    if has(FUSED):
        return "attention values" if has(OUTPUT) else "attention queries and keys"
    if has(OUTPUT):
        return "attention outputs"
    if has(ATTENTION):
        return "attention heads"
    return rests[0].rpartition(".")[0] or rests[0]


def _readable(place: str) -> str:
    """``text_model.encoder.layers.0`` -> ``text layers.0``; names of the whole model are left out."""
    words = place.split(".")
    first = next((i for i, w in enumerate(words) if w in TOWERS), None)
    count = next(i for i, w in enumerate(words) if w.isdigit())
    tail = ".".join(words[count - 1 :])
    return tail if first is None else f"{TOWERS[words[first]]} {tail}"


def _tower(names: list[str]) -> str:
    towers = {next((TOWERS[w] for w in n.split(".") if w in TOWERS), None) for n in names}
    known = towers - {None}
    return f"{known.pop()} residual stream" if len(known) == 1 and len(towers) == 1 else "residual stream"
