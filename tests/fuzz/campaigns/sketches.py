"""Sketches: the tables in their metadata, and tensors of other shapes and kinds."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

from .. import odd
from ..case import Case, campaign
from ..files import join
from . import models


@campaign("sketches", share=0.6, processes=100)
def sketches(rng: random.Random, folder: Path) -> Case:
    raw = {name: models.content(name) for name in ("a.sketch", "b.sketch")}
    valid = rng.random() < 0.04
    if not valid:
        for name in rng.choice((["b.sketch"], ["b.sketch"], ["a.sketch"], list(raw))):
            raw[name] = _damaged(rng, raw[name])
    for name, content in raw.items():
        (folder / name).write_bytes(content)
    words = ["predict", *raw, *(["--json"] if rng.random() < 0.3 else [])]
    return Case(words, codes=frozenset({0}) if valid else frozenset({0, 1, 2}))


def _damaged(rng: random.Random, raw: bytes) -> bytes:
    if rng.random() < 0.1:
        return odd.damaged_bytes(rng, raw)
    (length,) = struct.unpack("<Q", raw[:8])
    header: dict[str, Any] = json.loads(raw[8 : 8 + length])
    data = raw[8 + length :]
    about = header["__metadata__"]
    how = rng.randrange(5)
    if how == 0:  # a table inside of a text
        key = rng.choice(("spaces", "names", "repairable"))
        tree = odd.damaged(rng, json.loads(about[key]))
        about[key] = odd.written(rng, tree, 0.1).decode("utf-8", "replace")
    elif how == 1:
        key = rng.choice(list(about))
        if rng.random() < 0.4:
            del about[key]
        else:
            about[key] = odd.text(rng)
    elif how == 2:  # the same bytes under another shape or kind
        name = rng.choice([n for n in header if n != "__metadata__"])
        entry = header[name]
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        entry["dtype"], width = rng.choice(
            (("F32", 4), ("I32", 4), ("F64", 8), ("I64", 8), ("U8", 1), ("F16", 2), ("BOOL", 1))
        )
        count = size // width
        entry["shape"] = rng.choice(
            ([count], [1, count], [count, 1], [1, 1, count], [count // 2, 2] if count % 2 == 0 else [count])
        )
    elif how == 3:  # other numbers
        name = rng.choice([n for n in header if n != "__metadata__"])
        first, last = header[name]["data_offsets"]
        noise = rng.choice((b"\xff", b"\x00", b"\x7f", b"\x80")) * (last - first)
        data = data[:first] + (noise if rng.random() < 0.5 else rng.randbytes(last - first)) + data[last:]
    else:
        name = rng.choice([n for n in header if n != "__metadata__"])
        header[rng.choice((odd.text(rng), "activations.s99", "members.s0", "activations."))] = header.pop(name)
    return join(header, data)
