"""Human labels for spaces, made from the names of the tensors that a space lives on."""

from __future__ import annotations

import re
from collections.abc import Iterable

# "layer2.1", "stages.2.blocks.1", "stages.2.1", "blocks.3.1", "layers.0.blocks.1": stage and block.
STAGED = re.compile(
    r"^(?:layer(?P<a>\d+)\.(?P<b>\d+)|(?:stages?|layers|blocks|features)\.(?P<c>\d+)\.(?:blocks?\.|layers?\.)?(?P<d>\d+))\."
    r"(?P<rest>.+)$"
)
BLOCK = re.compile(
    r"^(?P<place>(?:\w+\.)?(?:blocks?|layers|stages|encoder)[._]?\d+|[a-z_]*blocks?\d*\.\d+)\.(?P<rest>.+)$"
)
SQUEEZE = re.compile(r"(^|\.)(se|se_module|gate|attn_se)\.")
ATTENTION = re.compile(r"(^|\.)(attn\w*|qkv|token_mixer|self_attn)\b")
MLP = re.compile(r"(^|\.)(mlp\w*|ffn|fc1|fc2|pwconv1|pwconv2)\b")
NORM = re.compile(r"(bn|norm|ln|gn)\w*\.(weight|bias|running_mean|running_var)$")
QKV = re.compile(r"(qkv|\bq\b|\bk\b|q_proj|k_proj|\bkv\b)")
VALUES = re.compile(r"(attn\w*\.proj\b|attn\w*\.o_proj|out_proj)")


def space_label(axes: Iterable[tuple[str, int]]) -> str | None:
    """A label for the space on these (tensor, axis) pairs, None where the names tell nothing.

    A space inside one block is named after the block and the part of it; one that several blocks share is a residual
    stream, named after its stages. A pair that is given twice belongs to several
    spaces that share their blocks: attention heads.
    """
    pairs = sorted(axes)
    if not pairs:
        return None
    several = len(set(pairs)) < len(pairs)
    tensors = sorted({n for n, _ in pairs})
    written = [n for n, axis in pairs if axis == 0 and not NORM.search(n)]
    writers = {_place(n)[0] for n in written}
    if len(writers) > 1:
        return _stream(written)
    place = next(iter(writers)) if writers else _place(tensors[0])[0]
    if place is None:
        return _writer(tensors, written)
    if {_place(n)[0] for n in tensors} != {place}:
        return f"{place} output"
    return f"{place} {_named_part(_rests(tensors), several) or _writer(_rests(tensors), _rests(written))}"


def _stream(names: list[str]) -> str:
    """ "stage 2 residual stream", "stages 2-3 residual stream", or plainly "residual stream" in a net without stages
    (what writes from outside the blocks, stems and downsampling, does not count)."""
    stages = sorted({int(s) for n in names if (s := _stage(n)) is not None})
    if not stages:
        return "residual stream"
    if len(stages) == 1:
        return f"stage {stages[0]} residual stream"
    return f"stages {stages[0]}-{stages[-1]} residual stream"


def _writer(names: list[str], written: list[str]) -> str:
    """The module that makes the space: the first whose weight writes to it."""
    weights = [n for n in written if n.endswith(".weight")]
    chosen = (weights or written or names)[0]
    return chosen.rpartition(".")[0] or chosen


def _rests(names: list[str]) -> list[str]:
    return [_place(n)[1] for n in names]


def _place(name: str) -> tuple[str | None, str]:
    """Block that a tensor belongs to ("stage 2 block 1", "blocks.3") and the rest of its name."""
    if (m := STAGED.match(name)) is not None:
        stage, block = (m["a"], m["b"]) if m["a"] is not None else (m["c"], m["d"])
        return f"stage {stage} block {block}", m["rest"]
    if (m := BLOCK.match(name)) is not None:
        return m["place"], m["rest"]
    return None, name


def _stage(name: str) -> str | None:
    """Number of the stage whose block a tensor belongs to."""
    m = STAGED.match(name)
    return None if m is None else str(m["a"] if m["a"] is not None else m["c"])


def _named_part(rests: list[str], several: bool) -> str | None:
    """What a block's part is commonly called, None for plain convolutions and the like."""
    if all(SQUEEZE.search(r) for r in rests):
        return "squeeze-and-excite hidden"
    if any(ATTENTION.search(r) for r in rests):
        if several:
            return "attention heads"
        if any(VALUES.search(r) for r in rests):
            return "attention values"
        return "attention queries and keys" if any(QKV.search(r) for r in rests) else "attention heads"
    return "MLP hidden" if any(MLP.search(r) for r in rests) else None
