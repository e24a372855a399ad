"""Human labels for spaces, made from the names of the tensors that a space lives on."""

from __future__ import annotations

import re
from collections.abc import Iterable

# "layer2.1", "stages.2.blocks.1", "stages.2.1", "blocks.3.1", "layers.0.blocks.1": stage and block.
STAGED = re.compile(
    r"^(?:layer(?P<a>\d+)\.(?P<b>\d+)|(?:stages?|layers|blocks|features)\.(?P<c>\d+)\.(?:blocks?\.|layers?\.)?(?P<d>\d+))\."
    r"(?P<rest>.+)$"
)
STAGE = re.compile(r"^(?:layer(?P<a>\d+)|(?:stages?|layers)\.(?P<c>\d+))\.")
BLOCK = re.compile(
    r"^(?P<place>(?:\w+\.)?(?:blocks?|layers|stages|encoder)[._]?\d+|[a-z_]*blocks?\d*\.\d+)\.(?P<rest>.+)$"
)
# Which part of a block a tensor belongs to: first match wins.
PARTS = (
    ("squeeze-and-excite hidden", re.compile(r"(^|\.)(se|se_module|gate|attn_se)\.")),
    ("attention", re.compile(r"(^|\.)(attn\w*|qkv|token_mixer|self_attn)\b")),
    ("MLP hidden", re.compile(r"(^|\.)(mlp\w*|ffn|fc1|fc2|pwconv1|pwconv2)\b")),
)
NORM = re.compile(r"(bn|norm|ln|gn)\w*\.(weight|bias)$")
QKV = re.compile(r"(qkv|\bq\b|\bk\b|q_proj|k_proj|\bkv\b)")
VALUES = re.compile(r"(attn\w*\.proj\b|attn\w*\.o_proj|out_proj)")


def space_label(axes: Iterable[tuple[str, int]]) -> str | None:
    """A label for the space on these (tensor, axis) pairs, None where the names tell nothing.

    A space inside one block is named after the block and the part of it; one that several blocks of a stage share is
    the stage's residual stream.
    """
    pairs = sorted(axes)
    tensors = sorted({n for n, _ in pairs})
    if not tensors:
        return None
    places = [_place(n) for n in tensors]
    blocks = {p for p, _ in places if p is not None}
    outside = [n for n, (p, _) in zip(tensors, places, strict=True) if p is None]
    if len(blocks) > 1 or (len(blocks) == 1 and outside and _starts_outside(pairs)):
        stages = {_stage(n) for n in tensors if _stage(n) is not None and _writes(n, pairs)}
        return f"{stages.pop()} residual stream" if len(stages) == 1 else "residual stream"
    if len(blocks) == 1:
        part = _part([r for p, r in places if p is not None], pairs)
        return f"{blocks.pop()} {part}"
    return _writer(tensors, [n for n, axis in pairs if axis == 0])


def _writer(names: list[str], written: list[str]) -> str:
    """The module that makes the space: the first whose weight writes to it and that is no norm."""
    weights = [n for n in written if n.endswith(".weight")]
    chosen = next((n for n in weights if not NORM.search(n)), (weights or written or names)[0])
    return chosen.rpartition(".")[0] or chosen


def _place(name: str) -> tuple[str | None, str]:
    """Block that a tensor belongs to ("stage 2 block 1", "blocks.3") and the rest of its name."""
    if (m := STAGED.match(name)) is not None:
        stage, block = (m["a"], m["b"]) if m["a"] is not None else (m["c"], m["d"])
        return f"stage {stage} block {block}", m["rest"]
    if (m := BLOCK.match(name)) is not None:
        return m["place"], m["rest"]
    return None, name


def _stage(name: str) -> str | None:
    if (m := STAGED.match(name)) is not None:
        return f"stage {m['a'] if m['a'] is not None else m['c']}"
    return f"stage {m['a'] or m['c']}" if (m := STAGE.match(name)) is not None else None


def _writes(name: str, pairs: list[tuple[str, int]]) -> bool:
    return (name, 0) in pairs


def _starts_outside(pairs: list[tuple[str, int]]) -> bool:
    """Whether a tensor outside all blocks writes to the space (a stem or an embedding does, a norm or head reads)."""
    return any(_place(n)[0] is None and axis == 0 for n, axis in pairs)


def _part(rests: list[str], pairs: list[tuple[str, int]]) -> str:
    for label, pattern in PARTS:
        if any(pattern.search(r) for r in rests):
            if label != "attention":
                return label
            if any(VALUES.search(r) for r in rests):
                return "attention values"
            return "attention queries and keys" if any(QKV.search(r) for r in rests) else "attention heads"
    writers = [_place(n)[1] for n, axis in pairs if axis == 0 and _place(n)[0] is not None]
    return _writer(rests, writers)
