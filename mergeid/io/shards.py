"""How an output's tensors are laid out in its files: which file, in which order, at which byte."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mergeid.errors import MergeidError
from mergeid.io.checkpoint import Checkpoint, Part
from mergeid.io.dtypes import BITS
from mergeid.io.folders import INDEX, SAFETENSORS
from mergeid.plugins import TensorInfo

_METADATA = "__metadata__"


@dataclass(frozen=True)
class Shard:
    """One weight file to be written.

    Attributes:
        name: its file name.
        tensors: what it holds, in the order of the bytes.
        spans: tensor name -> (first byte, one past the last), counted from the start of the file.
        header: the bytes before the first tensor.
        size: bytes of the whole file.
        prefix: before the names of the tensors, but not in the file.
    """

    name: str
    tensors: dict[str, TensorInfo]
    spans: dict[str, tuple[int, int]]
    header: bytes
    size: int
    prefix: str = ""


@dataclass(frozen=True)
class Layout:
    """The weight files of one checkpoint.

    Attributes:
        shards: the files.
        indices: name -> content of the files that say what lies where, one for each network in several files.
    """

    shards: tuple[Shard, ...]
    indices: Mapping[str, str] = field(default_factory=dict)


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
        if like.parts:
            raise MergeidError(
                f"output {single} is one file, but {like.source} holds several networks in sub-folders; expected a "
                "folder (option -o)"
            )
        if shard_size is not None:
            raise MergeidError(f"--shard-size splits a folder's weights, and {single} is one file; name a folder (-o)")
        return Layout((_shard(single, table, like.metadata),))
    if not like.parts:
        sharded = like.index is not None and bool(like.file_metadata)
        name = like.files[0].name if not sharded and like.is_folder and like.file_metadata else name
        whole = Part("", "", like.files, like.index if sharded else None, like.index_metadata)
        return _of_part(like, whole, table, shard_size, name)
    found = Layout(())
    for part in like.parts:
        others = tuple(p.prefix for p in like.parts if len(p.prefix) > len(part.prefix))
        own = {n: info for n, info in table.items() if n.startswith(part.prefix) and not n.startswith(others)}
        file = part.files[0]  # a pickle becomes a file of the name that its library gives
        name = file.name if file in like.file_metadata else file.stem.removeprefix("pytorch_") + SAFETENSORS
        more = _of_part(like, part, own, shard_size, name)
        found = Layout((*found.shards, *more.shards), {**found.indices, **more.indices})
    return found


def _of_part(
    like: Checkpoint, part: Part, table: Mapping[str, TensorInfo], shard_size: int | None, name: str
) -> Layout:
    """The files of one network.

    Args:
        name: of its file, where it is one.
    """
    begin = f"{part.folder}/" if part.folder else ""
    if shard_size is not None:
        stem = (
            name.removesuffix(SAFETENSORS) if part.index is None else part.index.partition(f"{SAFETENSORS}.index.")[0]
        )
        groups = _split(table, shard_size)
        places = [f"-{i + 1:05d}-of-{len(groups):05d}" for i in range(len(groups))] if len(groups) > 1 else [""]
        listed = {f"{begin}{stem}{place}{SAFETENSORS}": group for place, group in zip(places, groups, strict=True)}
        index = f"{stem}{INDEX}" if len(groups) > 1 else None
        about: Mapping[str, Mapping[str, str]] = dict.fromkeys(listed, _metadata(like, part))
    elif part.index is None:
        listed, index, about = {begin + name: dict(table)}, None, {begin + name: _metadata(like, part)}
    else:  # tensors that lie in none of its files go into the first
        index = part.index
        placed = {n: like.file_of[n] if like.file_of[n] in part.files else part.files[0] for n in table}
        listed = {begin + f.name: {n: i for n, i in table.items() if placed[n] == f} for f in part.files}
        about = {begin + f.name: like.file_metadata.get(f, {}) for f in part.files}
    shards = tuple(_shard(name, group, about[name], part.prefix) for name, group in listed.items())
    return Layout(shards, {} if index is None else {begin + index: _index_text(part, shards)})


def _metadata(like: Checkpoint, part: Part) -> Mapping[str, str]:
    """What goes into the header of a file that holds what lay in several."""
    return {k: v for f in part.files for k, v in like.file_metadata.get(f, {}).items()} if like.parts else like.metadata


def _split(table: Mapping[str, TensorInfo], most: int) -> list[dict[str, TensorInfo]]:
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
    return groups


def _index_text(part: Part, shards: Sequence[Shard]) -> str:
    """The ``*.safetensors.index.json`` that goes with the shards."""
    sizes = (shard.size - len(shard.header) for shard in shards)
    weight_map = {n.removeprefix(part.prefix): s.name.rpartition("/")[2] for s in shards for n in s.tensors}
    index = {
        "metadata": {**part.index_metadata, "total_size": sum(sizes)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return json.dumps(index, indent=2) + "\n"


def _bytes(info: TensorInfo) -> int:
    bits = BITS[info.dtype]
    for n in info.shape:
        bits *= n
    return bits // 8


def _shard(name: str, tensors: dict[str, TensorInfo], metadata: Mapping[str, str], prefix: str = "") -> Shard:
    if not _aligned(tensors):
        # A changed dtype can leave later tensors unaligned: wide numbers first, else the order of the input.
        tensors = dict(sorted(tensors.items(), key=lambda item: -BITS[item[1].dtype]))
    entries: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    offsets: dict[str, tuple[int, int]] = {}
    end = 0
    for key, info in tensors.items():
        if key.removeprefix(prefix) == _METADATA:
            raise MergeidError(
                f"a tensor is named {_METADATA!r}, under which safetensors keeps what a file says of itself; rename it"
            )
        offsets[key] = (end, end + _bytes(info))
        end = offsets[key][1]
        entries[key.removeprefix(prefix)] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": list(offsets[key]),
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    begin = len(header)
    spans = {key: (begin + first, begin + last) for key, (first, last) in offsets.items()}
    return Shard(name, tensors, spans, header, begin + end, prefix)


def _aligned(tensors: Mapping[str, TensorInfo]) -> bool:
    at = 0
    for info in tensors.values():
        if BITS[info.dtype] >= 8 and at % (BITS[info.dtype] // 8):
            return False
        at += _bytes(info)
    return True
