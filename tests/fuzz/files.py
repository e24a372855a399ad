"""Small models as bytes, made without the libraries under test, and an independent reading of what comes out."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np

Table = dict[str, tuple[str, list[int], bytes]]
"""Name -> dtype, shape, bytes."""


def safetensors(table: Table, metadata: dict[str, str] | None = None, pad: int = 8) -> bytes:
    """A safetensors file."""
    return join(*header_of(table, metadata), pad)


def header_of(table: Table, metadata: dict[str, str] | None = None) -> tuple[dict[str, Any], bytes]:
    """Its header and its data."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, (dtype, shape, raw) in table.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return header, data


def join(header: Any, data: bytes, pad: int = 8, text: bytes | None = None) -> bytes:
    written = text if text is not None else json.dumps(header).encode("utf-8", "surrogatepass")
    written += b" " * (-len(written) % pad)
    return struct.pack("<Q", len(written)) + written + data


def floats(rng: random.Random, shape: list[int], scale: float = 1.0) -> tuple[str, list[int], bytes]:
    generator = np.random.default_rng(rng.randrange(2**32))
    return "F32", shape, (generator.standard_normal(shape) * scale).astype("<f4").tobytes()


def pair(rng: random.Random, names: list[str], shapes: list[list[int]]) -> tuple[Table, Table]:
    """Two models of one shape."""
    a: Table = {n: floats(rng, s) for n, s in zip(names, shapes, strict=True)}
    b: Table = {n: floats(rng, s) for n, s in zip(names, shapes, strict=True)}
    return a, b


def numbers(entry: tuple[str, list[int], bytes]) -> np.ndarray[Any, Any]:
    dtype, shape, raw = entry
    if dtype == "BF16":
        wide = np.frombuffer(raw, "<u2").astype("<u4") << 16
        return wide.view("<f4").reshape(shape).astype(np.float64)
    return np.frombuffer(raw, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).reshape(shape).astype(np.float64)


def read(path: Path) -> Table:
    """A safetensors file, read by the letter of the format. Raises ValueError where it is not whole."""
    raw = path.read_bytes()
    if len(raw) < 8:
        raise ValueError(f"{path.name} has {len(raw)} bytes")
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    data = raw[8 + length :]
    table: Table = {}
    end = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        end = max(end, last)
        table[name] = entry["dtype"], entry["shape"], data[first:last]
    if end != len(data):
        raise ValueError(f"{path.name}: {len(data)} bytes of data, {end} in the header")
    return table


def averaged(out: Path, models: list[Table], weights: list[float], left: set[str] = frozenset()) -> str | None:  # type: ignore[assignment]
    """What is wrong with a merge by weighted average, or None. `left`: tensors that are A's."""
    try:
        found = read(out)
    except (ValueError, KeyError, OSError) as error:
        return f"the output is not whole: {error}"
    if set(found) != set(models[0]):
        return f"the output has the tensors {sorted(found)}"
    for name, entry in found.items():
        wanted = (
            numbers(models[0][name])
            if name in left
            else sum(w * numbers(m[name]) for w, m in zip(weights, models, strict=True))
        )
        if list(entry[1]) != list(models[0][name][1]):
            return f"{name!r} has shape {entry[1]}"
        eps = {"F64": 1e-12, "F32": 1e-5, "F16": 2e-3, "BF16": 2e-2}[entry[0]]
        scale = np.abs(np.asarray([numbers(m[name]) for m in models])).max(initial=1e-30)
        if not np.allclose(numbers(entry), wanted, rtol=eps, atol=eps * scale):
            return f"{name!r} is not the average"
    return None
