"""Reading and checking the header of a safetensors file, in plain Python.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the header's length, the header as JSON, then
the tensors' bytes without gaps. Everything that can be wrong with a file is found here, before any work is done.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mergeid.basics.reading import check_regular
from mergeid.errors import MergeidError, is_text, reason
from mergeid.io.dtypes import BITS
from mergeid.plugins import TensorInfo

MAX_HEADER = 100_000_000
"""Longest header that the format allows, in bytes."""
LARGEST = 2**63 - 1
"""Largest number of a shape or offset, and most elements of a tensor."""
MOST_DIMENSIONS = 32
"""Most dimensions of a tensor (NumPy and torch stop at about twice as many)."""


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself.

    Attributes:
        tensors: name -> dtype and shape, in the order in which the bytes lie in the file.
        spans: name -> (first byte, one past the last byte), counted from the start of the file.
        metadata: the file's ``__metadata__``.
    """

    tensors: dict[str, TensorInfo]
    spans: dict[str, tuple[int, int]]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of one file.

    Raises:
        MergeidError: missing, unreadable, empty, not safetensors, truncated or damaged, in one sentence.
    """
    check_regular(path, "a .safetensors file or a model folder")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            text = file.read(length) if 2 <= length <= min(MAX_HEADER, size) else file.read(32)
    except OSError as error:
        raise MergeidError(f"cannot read {path}: {reason(error)}") from None
    if size == 0:
        raise MergeidError(f"{path} is empty (0 bytes); expected a safetensors file: copy or download it again")
    if size < 10 or length > MAX_HEADER or text[:1] != b"{":
        raise MergeidError(_not_safetensors(path, start + text))
    if len(text) < length:
        raise MergeidError(
            f"{path} is truncated: its header alone takes {8 + length:,} bytes and the file has {size:,}; "
            "copy or download it again"
        )
    return _check(path, _parse(path, text), 8 + length, size)


def _not_safetensors(path: Path, start: bytes) -> str:
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a Git LFS pointer, not the weights themselves: run `git lfs pull` in its repository"
    if start[:2] in (b"PK", b"\x80\x02", b"\x80\x04"):
        return (
            f"{path} is a PyTorch pickle, not a safetensors file; save it with safetensors.torch.save_file, "
            "or give it its .bin/.pt ending and pass --allow-pickle if you trust where it comes from"
        )
    return f"{path} is not a safetensors file (no valid header at its start); expected .safetensors weights"


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name occurs twice")
        return found

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        why = "it nests too deeply" if isinstance(error, RecursionError) else reason(error)
        raise MergeidError(f"{path} is not a valid safetensors file: its header is not JSON ({why})") from None
    answer: dict[str, Any] = parsed
    return answer


def _check(path: Path, entries: dict[str, Any], begin: int, size: int) -> Header:
    """Spans without gaps or overlaps, each as long as dtype and shape say, ending where the file ends."""

    def bad(name: str, why: str) -> MergeidError:
        return MergeidError(f"{path} is damaged: its header entry for tensor {name!r} {why}; copy it again")

    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise MergeidError(f"{path} is damaged: its __metadata__ is not a table of strings")
    found: list[tuple[int, int, str, TensorInfo]] = []
    for name, entry in entries.items():
        try:
            dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise bad(name, "lacks dtype, shape or data_offsets") from None
        numbers = (*shape, first, last)
        if not isinstance(dtype, str) or not all(type(n) is int and 0 <= n <= LARGEST for n in numbers):
            raise bad(name, "has a wrong dtype, shape or data_offsets")
        if len(shape) > MOST_DIMENSIONS or first > last:
            raise bad(name, "has too many dimensions, or data_offsets that run backwards")
        if not is_text(name):
            raise bad(name, "has a broken character in its name")
        elements = prod(shape)
        if not elements and prod(n for n in shape if n) > LARGEST:  # nothing, but no library can count it
            raise bad(name, "has a shape beyond 64 bits")
        if dtype in BITS and (last - first) * 8 != elements * BITS[dtype]:
            raise bad(name, f"claims {last - first:,} bytes for {dtype} of shape {list(shape)}")
        found.append((first, last, name, TensorInfo(dtype, shape)))
    found.sort(key=lambda item: item[:2])
    end = 0
    for first, last, name, _ in found:
        if first != end:
            raise bad(name, "overlaps its neighbour or leaves a gap")
        end = last
    if begin + end > size:
        raise MergeidError(
            f"{path} is truncated: its tensors need {begin + end:,} bytes and the file has {size:,}; "
            "copy or download it again"
        )
    if begin + end < size:
        raise MergeidError(
            f"{path} is damaged: {size - begin - end:,} bytes follow the last tensor; copy or download it again"
        )
    return Header(
        tensors={name: info for _, _, name, info in found},
        spans={name: (begin + first, begin + last) for first, last, name, _ in found},
        metadata=metadata,
    )


def in_order(data: bytes) -> bytes:
    """A safetensors file in memory with its metadata sorted: the library writes them in an order that changes from run
    to run, and the same content should be the same bytes."""
    size = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + size])
    about = entries.pop("__metadata__", None)
    if about is None:
        return data
    header = json.dumps({"__metadata__": dict(sorted(about.items())), **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]
