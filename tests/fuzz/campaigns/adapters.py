"""LoRA adapters: their configs, the names and shapes of their factors, and bases that are named in odd ways."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

from .. import odd
from ..case import Case, campaign
from ..files import Table, floats, join, safetensors
from . import models

CONFIG: dict[str, Any] = {
    "base_model_name_or_path": "a", "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query", "value"],
    "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False, "rank_pattern": {},
    "alpha_pattern": {}, "modules_to_save": None, "task_type": "SEQ_CLS",
}  # fmt: skip
PREFIX = "base_model.model.bert.encoder.layer.0.attention.self"
VALUES: tuple[Any, ...] = (
    0, -1, 10**30, float("nan"), "x", None, True, [], {}, ["query"], {"query": 3}, {"[": 1}, "(", "../a", "/dev/zero",
    "a\0b", ".", "p", "org/none", "all-linear",
)  # fmt: skip


@campaign("adapters", share=0.8, processes=100)
def adapters(rng: random.Random, folder: Path) -> Case:
    models.put(folder, "a")
    valid = rng.random() < 0.06
    for name in "pq":
        factors: Table = {}
        for module in ("query", "value"):
            factors[f"{PREFIX}.{module}.lora_A.weight"] = floats(rng, [2, 8])
            factors[f"{PREFIX}.{module}.lora_B.weight"] = floats(rng, [8, 2])
        config, raw = CONFIG, safetensors(factors, {"format": "pt"})
        if not valid and rng.random() < 0.7:
            config = odd.damaged(rng, CONFIG) if rng.random() < 0.5 else _meant(rng)
        if not valid and rng.random() < 0.4:
            raw = _damaged(rng, raw)
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_bytes(odd.written(rng, config, 0.0 if valid else 0.06))
        (folder / name / "adapter_model.safetensors").write_bytes(raw)
    words = rng.choice(
        (
            ["merge", "p", "q", "-o", "o", "--match", "never"],
            ["merge", "a+p", "a+q", "-o", "o", "--match", "never"],
            ["merge", "p", "q", "--base", "a", "--method", "task_arithmetic", "-o", "o", "--match", "never"],
            ["merge", "p", "q", "--as-adapter", "2", "-o", "o", "--match", "never"],
            ["graph", "p"],
        )
    )
    return Case(words, ("o",), codes=frozenset({0}) if valid and words[0] == "merge" else frozenset({0, 1, 2}))


def _meant(rng: random.Random) -> dict[str, Any]:
    return {**CONFIG, rng.choice(list(CONFIG)): rng.choice(VALUES)}


def _damaged(rng: random.Random, raw: bytes) -> bytes:
    if rng.random() < 0.2:
        return odd.damaged_bytes(rng, raw)
    (length,) = struct.unpack("<Q", raw[:8])
    header: dict[str, Any] = json.loads(raw[8 : 8 + length])
    name = rng.choice([n for n in header if n != "__metadata__"])
    how = rng.randrange(4)
    if how == 0:
        other = (
            name + "x",
            PREFIX + name,
            name.replace("lora_A", "lora_C"),
            name.replace("query", "key"),
            "",
            "lora_A",
        )
        header[rng.choice(other)] = header.pop(name)
    elif how == 1:
        header[name]["shape"] = rng.choice((header[name]["shape"][::-1], [16], [1, 16], [4, 4], [2, 2, 4]))
    elif how == 2:
        header[name]["dtype"] = rng.choice(("I32", "U32", "XX", 5, None))
    else:
        del header[name]
    return join(header, raw[8 + length :])
