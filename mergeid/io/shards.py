"""How an output's tensors are laid out in its files: which file, in which order, at which byte."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from mergeid.errors import MergeidError
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.dtypes import BITS
from mergeid.plugins import TensorInfo


@dataclass(frozen=True)
class Shard:
    """One weight file to be written.

    Attributes:
        name: its file name.
        tensors: what it holds, in the order of the bytes.
        spans: tensor name -> (first byte, one past the last), counted from the start of the file.
        header: the bytes before the first tensor.
        size: bytes of the whole file.
    """

    name: str
    tensors: dict[str, TensorInfo]
    spans: dict[str, tuple[int, int]]
    header: bytes
    size: int


def lay_out(
    like: Checkpoint, *, single: str | None, dtypes: Mapping[str, str], name: str = "model.safetensors"
) -> list[Shard]:
    """The files of a checkpoint that has the tensors of `like`, sharded as `like` is.

    Args:
        like: gives names, shapes, order, sharding and metadata.
        single: name of the one file to put everything into, or None to keep the sharding.
        dtypes: tensor name -> dtype, where it differs from that of `like`.
        name: of the file in a folder, where `like` lies in none of a name of its own.

    Raises:
        MergeidError: a dtype of unknown size.
    """
    table = {n: TensorInfo(dtypes.get(n, info.dtype), info.shape) for n, info in like.table.items()}
    for key, info in table.items():
        if info.dtype not in BITS:
            raise MergeidError(f"tensor {key!r} has the unknown dtype {info.dtype}; expected one of {', '.join(BITS)}")
    if single is not None:
        return [_shard(single, table, like.metadata)]
    if like.index is None or not like.file_metadata:  # one file, or pickles that become one file
        name = like.files[0].name if like.is_folder and like.file_metadata else name
        return [_shard(name, table, like.metadata)]
    return [
        _shard(
            file.name,
            {n: info for n, info in table.items() if like.file_of[n] == file},
            like.file_metadata.get(file, {}),
        )
        for file in like.files
    ]


def index_text(like: Checkpoint, shards: list[Shard]) -> str:
    """The ``*.safetensors.index.json`` that goes with the shards."""
    sizes = (shard.size - len(shard.header) for shard in shards)
    weight_map = {name: shard.name for shard in shards for name in shard.tensors}
    index = {
        "metadata": {**like.index_metadata, "total_size": sum(sizes)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return json.dumps(index, indent=2) + "\n"


def _bytes(info: TensorInfo) -> int:
    bits = BITS[info.dtype]
    for n in info.shape:
        bits *= n
    return bits // 8


def _shard(name: str, tensors: dict[str, TensorInfo], metadata: Mapping[str, str]) -> Shard:
    if not _aligned(tensors):
        # A changed dtype can leave later tensors unaligned: wide numbers first, else the order of the input.
        tensors = dict(sorted(tensors.items(), key=lambda item: -BITS[item[1].dtype]))
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets: dict[str, tuple[int, int]] = {}
    end = 0
    for key, info in tensors.items():
        offsets[key] = (end, end + _bytes(info))
        end = offsets[key][1]
        entries[key] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(offsets[key])}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    begin = len(header)
    spans = {key: (begin + first, begin + last) for key, (first, last) in offsets.items()}
    return Shard(name, tensors, spans, header, begin + end)


def _aligned(tensors: Mapping[str, TensorInfo]) -> bool:
    at = 0
    for info in tensors.values():
        if BITS[info.dtype] >= 8 and at % (BITS[info.dtype] // 8):
            return False
        at += _bytes(info)
    return True
