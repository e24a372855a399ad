"""How an output's tensors are laid out in its files: which file, in which order, at which byte."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class Layout:
    """The weight files of one checkpoint.

    Attributes:
        shards: the files.
        index: name of the index that says what lies where; None: there is none.
    """

    shards: tuple[Shard, ...]
    index: str | None = None


def lay_out(
    like: Checkpoint,
    *,
    single: str | None,
    dtypes: Mapping[str, str],
    name: str = "model.safetensors",
    shard_size: int | None = None,
) -> Layout:
    """The files of a checkpoint that has the tensors of `like`, sharded as `like` is unless a size is given.

    Args:
        like: gives names, shapes, order, sharding and metadata.
        single: name of the one file to put everything into, or None to keep the sharding.
        dtypes: tensor name -> dtype, where it differs from that of `like`.
        name: of the file in a folder, where `like` lies in none of a name of its own.
        shard_size: most bytes of tensors in a file (a larger tensor has one of its own).

    Raises:
        MergeidError: a dtype of unknown size; a size of shards for a single file.
    """
    table = {n: TensorInfo(dtypes.get(n, info.dtype), info.shape) for n, info in like.table.items()}
    for key, info in table.items():
        if info.dtype not in BITS:
            raise MergeidError(f"tensor {key!r} has the unknown dtype {info.dtype}; expected one of {', '.join(BITS)}")
    if single is not None:
        if shard_size is not None:
            raise MergeidError(f"--shard-size splits a folder's weights, and {single} is one file; name a folder (-o)")
        return Layout((_shard(single, table, like.metadata),))
    sharded = like.index is not None and bool(like.file_metadata)
    if not sharded:  # one file, or pickles that become one file
        name = like.files[0].name if like.is_folder and like.file_metadata else name
    if shard_size is not None:
        stem = (str(like.index).removesuffix(".index.json") if sharded else name).removesuffix(".safetensors")
        return _split(stem, table, like.metadata, shard_size)
    if not sharded:
        return Layout((_shard(name, table, like.metadata),))
    files = {file: like.file_metadata.get(file, {}) for file in like.files}
    held = {file: {n: info for n, info in table.items() if like.file_of[n] == file} for file in files}
    return Layout(tuple(_shard(file.name, held[file], about) for file, about in files.items()), like.index)


def _split(stem: str, table: Mapping[str, TensorInfo], metadata: Mapping[str, str], most: int) -> Layout:
    """The tensors in their order, a new file wherever the next one has no room."""
    groups: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for key, info in table.items():
        size = _bytes(info)
        if groups[-1] and filled + size > most:
            groups.append({})
            filled = 0
        groups[-1][key] = info
        filled += size
    if len(groups) == 1:
        return Layout((_shard(f"{stem}.safetensors", groups[0], metadata),))
    names = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    shards = tuple(_shard(name, group, metadata) for name, group in zip(names, groups, strict=True))
    return Layout(shards, f"{stem}.safetensors.index.json")


def index_text(like: Checkpoint, shards: Sequence[Shard]) -> str:
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
