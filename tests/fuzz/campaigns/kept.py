"""What mergeid itself kept: records beside an output, a barrier to resume, an earlier output to replace."""

from __future__ import annotations

import json
import random
from pathlib import Path

from .. import odd
from ..case import Case, campaign
from ..files import pair, safetensors
from . import models


@campaign("kept", share=0.5, processes=50)
def kept(rng: random.Random, folder: Path) -> Case:
    if rng.random() < 0.35:
        return _resumed(rng, folder)
    for name, table in zip("ab", pair(rng, ["w"], [[2, 3]]), strict=True):
        (folder / f"{name}.safetensors").write_bytes(safetensors(table))
    record = json.loads(models.content("m/mergeid.json"))
    where = rng.choice(("file", "folder"))
    content = odd.written(rng, odd.damaged(rng, record) if rng.random() < 0.8 else record, 0.2)
    if where == "file":
        (folder / "mergeid.json").write_bytes(content)
        if rng.random() < 0.3:
            (folder / "o.safetensors").write_bytes(b"precious")
        words = ["merge", "a.safetensors", "b.safetensors", "-o", "o.safetensors", "--match", "never"]
        there = ["o.safetensors"] if (folder / "o.safetensors").exists() else []
        ours = _names(content, "o.safetensors")
        replaced = (*there, *(["mergeid.json"] if ours else []))
        outputs: tuple[str, ...] = ("o.safetensors", "o.mergeid.json")
    else:
        (folder / "o").mkdir()
        for name in rng.sample(
            ("mergeid.json", "config.json", "model.safetensors", "notes.txt", ".git"), rng.randrange(1, 4)
        ):
            (folder / "o" / name).write_bytes(content)
        words = ["merge", "a.safetensors", "b.safetensors", "-o", "o", "--match", "never"]
        replaced, outputs = ("o",), ()
    if rng.random() < 0.6:
        words.append("--force")
    else:
        replaced = tuple(n for n in replaced if n == "mergeid.json")
    return Case(words, outputs, replaced=replaced)


def _names(record: bytes, output: str) -> bool:
    """Whether a record tells of this output, whose record is then replaced."""
    try:
        return bool(json.loads(record)["output"] == output)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _resumed(rng: random.Random, folder: Path) -> Case:
    models.put(folder, "a", "b", "d.npz")
    kept = json.loads(models.content("r.json"))
    valid = rng.random() < 0.1
    (folder / "r.json").write_bytes(odd.written(rng, kept if valid else odd.damaged(rng, kept), 0.0 if valid else 0.15))
    words = ["barrier", "a", "b", "--data", "d.npz", "--points", "3", "--resume", "r.json"]
    return Case(words, replaced=("r.json",), codes=frozenset({0}) if valid else frozenset({0, 1, 2}))
