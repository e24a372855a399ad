"""Model folders: config.json, index, shards, what lies beside them."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

from .. import odd
from ..case import Case, campaign
from ..files import Table, averaged, pair, safetensors
from . import models

CONFIG: dict[str, Any] = {
    "architectures": ["BertForSequenceClassification"], "model_type": "bert", "hidden_size": 8, "vocab_size": 40,
    "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 32,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "torch_dtype": "float32",
    "transformers_version": "5.0.0", "layer_norm_eps": 1e-12, "hidden_act": "gelu",
}  # fmt: skip


@campaign("folders", share=9, processes=50)
def folders(rng: random.Random, folder: Path) -> Case:
    if rng.random() < 0.04:
        return _real(rng, folder)
    names = ["w", "b", "layers.0.weight", "layers.1.weight"]
    a, b = pair(rng, names, [[3, 2], [4], [2, 2], [2, 2]])
    valid = rng.random() < 0.1
    for name, table in (("a", a), ("b", b)):
        (folder / name).mkdir()
        config: Any = CONFIG if rng.random() < 0.5 or valid else odd.damaged(rng, CONFIG)
        if rng.random() < 0.8:
            (folder / name / "config.json").write_bytes(odd.written(rng, config, 0.0 if valid else 0.1))
        (_sharded if rng.random() < 0.6 else _single)(rng, folder / name, table, valid)
        if not valid:
            for _ in range(rng.choice((0, 0, 1, 2))):
                _beside(rng, folder / name)
    words = ["merge", "a", "b", "-o", rng.choice(("o", "o", "o.safetensors")), "--match", "never"]
    if not valid and rng.random() < 0.05:
        words = rng.choice(
            (["graph", "a"], ["plan", "a", "b"], ["scramble", "a", "-o", "o"], ["align", "a", "--to", "b", "-o", "o"])
        )
    out = words[words.index("-o") + 1] if "-o" in words else "o"

    def check(place: Path) -> str | None:
        if out == "o.safetensors":
            return averaged(place / out, [a, b], [0.5, 0.5])
        files = sorted((place / "o").glob("*.safetensors"))
        wrong = [w for f in files if (w := _part(f, a, b))]
        return wrong[0] if wrong else None if files else "no weights in the output folder"

    codes = frozenset({0}) if valid else frozenset({0, 1, 2})
    return Case(words, (out, "mergeid.json"), codes, check if valid else None)


def _part(file: Path, a: Table, b: Table) -> str | None:
    from ..files import read

    held = read(file)
    return averaged(file, [{n: a[n] for n in held}, {n: b[n] for n in held}], [0.5, 0.5])


def _single(rng: random.Random, place: Path, table: Table, valid: bool) -> None:
    raw = safetensors(table, {"format": "pt"})
    if not valid and rng.random() < 0.1:
        raw = odd.damaged_bytes(rng, raw)
    name = (
        "model.safetensors"
        if valid or rng.random() < 0.9
        else rng.choice(("x.safetensors", "adapter_model.safetensors"))
    )
    (place / name).write_bytes(raw)


def _sharded(rng: random.Random, place: Path, table: Table, valid: bool) -> None:
    names = list(table)
    files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    index: Any = {"metadata": {"total_size": 80}, "weight_map": {n: f for f, held in files.items() for n in held}}
    if not valid and rng.random() < 0.7:
        index = odd.damaged(rng, index) if rng.random() < 0.7 else _pointing(rng, index)
    (place / "model.safetensors.index.json").write_bytes(odd.written(rng, index, 0.0 if valid else 0.1))
    for file, held in files.items():
        if valid or rng.random() < 0.93:
            raw = safetensors({n: table[n] for n in held}, {"format": "pt"})
            (place / file).write_bytes(raw if valid or rng.random() < 0.95 else odd.damaged_bytes(rng, raw))


def _pointing(rng: random.Random, index: Any) -> Any:
    """Shards elsewhere: outside of the folder, twice, in things that are no files."""
    name = rng.choice(list(index["weight_map"]))
    index["weight_map"][name] = rng.choice(
        ("../b/model.safetensors", "/etc/passwd", "config.json", ".", "", "pipe", "model.safetensors.index.json",
         "model-00001-of-00002.safetensors", *odd.TEXTS)
    )  # fmt: skip
    return index


def _beside(rng: random.Random, place: Path) -> None:
    """Something odd that lies beside the weights, or in the place of a file of the model."""
    name = rng.choice(
        ("config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
         "vocab.txt", "preprocessor_config.json", "generation_config.json", "mergeid.json", "adapter_config.json",
         "x.bin",
         "pytorch_model.bin", "model-00001-of-00002.safetensors", "y.safetensors", ".hidden")
    )  # fmt: skip
    path = place / name
    if path.is_dir() and not path.is_symlink():
        return
    path.unlink(missing_ok=True)
    how = rng.randrange(7)
    if how == 0:
        path.mkdir()
    elif how == 1:
        os.mkfifo(path)
    elif how == 2:
        path.symlink_to(rng.choice((name, "nowhere", "/dev/zero", "/dev/null", "/proc/self/mem", "..", "config.json")))
    elif how == 3:
        path.write_bytes(b"")
    elif how == 4:
        path.write_bytes(rng.randbytes(100))
    else:
        path.write_bytes(odd.written(rng, odd.value(rng), 0.5))


def _real(rng: random.Random, folder: Path) -> Case:
    """A model that can run, with a config that is damaged."""
    models.put(folder, "a", "b")
    for name in rng.choice(("a", "b", "ab")):
        path = (
            folder
            / name
            / rng.choice(("config.json", "config.json", "config.json", "tokenizer_config.json", "vocab.txt"))
        )
        if path.suffix == ".json":
            path.write_bytes(odd.written(rng, odd.damaged(rng, json.loads(path.read_bytes())), 0.05))
        else:
            path.write_bytes(odd.damaged_bytes(rng, path.read_bytes()))
    words = rng.choice(
        (
            ["merge", "a", "b", "-o", "o"],
            ["graph", "a"],
            ["plan", "a", "b"],
            ["scramble", "b", "-o", "o"],
            ["predict", "a", "b"],
        )
    )
    return Case(words, ("o",))
