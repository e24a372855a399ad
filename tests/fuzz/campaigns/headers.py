"""safetensors files: every part of the header, and the numbers behind it."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import numpy as np

from .. import odd
from ..case import Case, campaign
from ..files import Table, averaged, floats, header_of, join, numbers, safetensors

OUT = "o.safetensors"
SHAPES: tuple[list[int], ...] = ([3, 2], [4], [], [0], [2, 3, 2], [1], [5, 0, 2])
DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "U16",
    "U32",
    "U64",
    "C64",
    "F4",
    "X",
)


@campaign("headers", share=16, processes=25)
def headers(rng: random.Random, folder: Path) -> Case:
    """A pair whose second file is damaged, more often than not."""
    a, b = _tables(rng)
    (folder / "a.safetensors").write_bytes(safetensors(a, {"format": "pt"}))
    kind = rng.choice((_valid, _valid, _numbers, _entry, _entry, _entry, _offsets, _text, _bytes, _bytes, _length))
    raw, codes, check = kind(rng, a, b)
    (folder / "b.safetensors").write_bytes(raw)
    names = ["a.safetensors", "b.safetensors"]
    if codes == {0, 1, 2} and rng.random() < 0.3:
        names.reverse()
    words = ["merge", *names, "-o", OUT, "--match", "never"]
    if codes == {0, 1, 2}:
        roll = rng.random()
        if roll < 0.01:
            words = [
                rng.choice(("plan", "barrier", "merge")),
                *names,
                *(["--data", "nothing.npz"] * (rng.random() < 0.5)),
            ]
            words += [] if words[0] != "merge" else ["-o", OUT]
        elif roll < 0.03:
            words = rng.choice((["graph", names[1]], ["predict", *names], ["scramble", names[1], "-o", OUT]))
        elif roll < 0.3:
            words += rng.choice((["--json"], ["--skip", "*"], ["--dtype", "float16"], ["--skip", odd.word(rng)]))
    return Case(words, (OUT, "mergeid.json"), frozenset(codes), check)


def _tables(rng: random.Random) -> tuple[Table, Table]:
    names = rng.sample(
        ("w", "b", "layers.0.weight", "layers.1.weight", "ü", "a b", "x" * 200, "module.fc.bias"), rng.randrange(1, 4)
    )
    a: Table = {}
    b: Table = {}
    for name in names:
        shape = rng.choice(SHAPES)
        if rng.random() < 0.3:
            dtype = rng.choice(("F64", "F16", "BF16"))
            a[name], b[name] = (_of(rng, dtype, shape) for _ in "ab")
        else:
            a[name], b[name] = floats(rng, shape), floats(rng, shape)
    return a, b


def _of(rng: random.Random, dtype: str, shape: list[int]) -> tuple[str, list[int], bytes]:
    values = numbers(floats(rng, shape))
    if dtype == "BF16":
        return dtype, shape, (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return dtype, shape, values.astype({"F64": "<f8", "F16": "<f2"}[dtype]).tobytes()


Made = tuple[bytes, set[int], Any]


def _valid(rng: random.Random, a: Table, b: Table) -> Made:
    metadata = rng.choice((None, {"format": "pt"}, {"a": "ü" * 99}, {"x": "1"}))
    order = list(b)
    rng.shuffle(order)
    raw = safetensors({n: b[n] for n in order}, metadata, rng.choice((1, 8, 64)))
    return raw, {0}, lambda folder: averaged(folder / OUT, [a, b], [0.5, 0.5])


def _numbers(rng: random.Random, a: Table, b: Table) -> Made:
    """NaN, infinities and the largest numbers: refused, or averaged without overflow."""
    name = rng.choice(list(b))
    dtype, shape, _ = b[name]
    values = numbers(b[name]).copy()
    if not values.size:
        return _valid(rng, a, b)
    most = {"F64": 1.7e308, "F32": 3.4e38, "F16": 65504.0, "BF16": 3.3e38}[dtype]
    number = rng.choice((float("nan"), float("inf"), -float("inf"), most, -most, most / 2, 1e-45))
    values.flat[rng.randrange(values.size)] = number
    if dtype == "BF16":
        packed = (values.astype("<f4").view("<u4") >> 16).astype("<u2")
    else:
        with np.errstate(over="ignore"):
            packed = values.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype])
    b = {**b, name: (dtype, shape, packed.tobytes())}
    finite = bool(np.isfinite(numbers(b[name])).all())
    if not finite:
        return safetensors(b), {2}, None
    return safetensors(b), {0, 2}, lambda folder: averaged(folder / OUT, [a, b], [0.5, 0.5])


def _entry(rng: random.Random, a: Table, b: Table) -> Made:
    """The header as JSON, with a few places changed; sometimes sizes that would still fit."""
    header, data = header_of(b, {"format": "pt"} if rng.random() < 0.5 else None)
    name = rng.choice(list(b))
    how = rng.randrange(6)
    if how == 0:
        header[name]["dtype"] = rng.choice((*DTYPES, odd.value(rng)))
    elif how == 1:
        header[name]["shape"] = rng.choice(
            ([2**62, 0], [0, 2**63], [2**64], [1] * 5000, [2**32, 2**32], [-1], [1.0], [True], "3", None)
        )
    elif how == 2:
        header["__metadata__"] = odd.value(rng)
    elif how == 3:
        header[odd.text(rng)] = header.pop(name)
    else:
        header = odd.damaged(rng, header)
    return join(header, data, text=odd.written(rng, header)), {0, 1, 2}, None


def _offsets(rng: random.Random, a: Table, b: Table) -> Made:
    header, data = header_of(b)
    for entry in header.values():
        if rng.random() < 0.6:
            at = rng.randrange(2)
            entry["data_offsets"][at] = rng.choice(
                (*odd.NUMBERS, len(data), len(data) + 1, entry["data_offsets"][1 - at])
            )
    return join(header, data, text=odd.written(rng, header, 0.0)), {0, 1, 2}, None


def _text(rng: random.Random, a: Table, b: Table) -> Made:
    header, data = header_of(b)
    return join(header, data, text=odd.written(rng, header, 1.0)), {0, 1, 2}, None


def _bytes(rng: random.Random, a: Table, b: Table) -> Made:
    return odd.damaged_bytes(rng, safetensors(b)), {0, 1, 2}, None


def _length(rng: random.Random, a: Table, b: Table) -> Made:
    raw = safetensors(b)
    length = rng.choice((0, 1, 2, 2**63, 2**64 - 1, 100_000_000, 100_000_001, len(raw), rng.randrange(len(raw) + 9)))
    start = rng.choice(
        (raw[8:], b"", b"{}", b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04", b"\x80\x02")
    )
    return struct.pack("<Q", length) + start, {0, 1, 2}, None
