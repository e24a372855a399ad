"""AdaMerging's claim (arXiv:2310.02575) on a small real case as in the paper, written to tables/adamerging.csv.

    apt-get install dataset-fashion-mnist
    python tests/bench/adamerging.py --seeds 3

Four tasks with their own inputs and heads: two halves of Fashion-MNIST's classes and two of handwritten digits
(scikit-learn's). The base, a small ViT, is trained on a little of all of them, with four heads. Then the heads stay
fixed, as the paper's do, and a copy of the trunk is fine-tuned on each task. Task arithmetic's coefficient is chosen on
labelled validation data; AdaMerging gets test images of each task without labels: 500 steps of Adam, from 0.3.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import tempfile
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, pad

import mergeid

TABLE = Path(__file__).parent / "tables" / "adamerging.csv"
FASHION = Path("/usr/share/datasets/fashion-mnist")
OPTIONS: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "in_chans": 1, "embed_dim": 48, "depth": 4, "num_heads": 3,
}  # fmt: skip
HALVES = ("fashion 0-4", "fashion 5-9", "digits 0-4", "digits 5-9")
TASKS = (*HALVES, *(f"{name}, negative on its side" for name in HALVES))
GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
Data = dict[str, tuple[Tensor, Tensor]]


def network(classes: int = 5) -> Any:
    return timm.create_model("vit_tiny_patch16_224", num_classes=classes, **OPTIONS)


def fashion() -> tuple[Tensor, Tensor]:
    """12,000 images of Fashion-MNIST, 32 pixels wide, from -1 to 1, and their classes."""

    def raw(name: str, skip: int) -> Tensor:
        content = gzip.decompress((FASHION / f"{name}-ubyte.gz").read_bytes())
        return torch.from_numpy(np.frombuffer(content, np.uint8, offset=skip).copy())

    images = raw("train-images-idx3", 16).reshape(-1, 1, 28, 28)[:12000]
    return pad(images.float() / 127.5 - 1, (2, 2, 2, 2), value=-1.0), raw("train-labels-idx1", 8)[:12000].long()


def tasks(seed: int) -> list[Data]:
    """Each task's images and labels from 0 to 4: "base", "own", "validation", "test"."""
    digits = torch.tensor(load_digits().images, dtype=torch.float32)[:, None]
    sets = [fashion(), (interpolate(digits / 8 - 1, 32, mode="bilinear"), torch.tensor(load_digits().target))]
    found = []
    generator = torch.Generator().manual_seed(seed)
    for x, y in sets:
        for half in range(2):
            mine = torch.nonzero(y.long() // 5 == half)[:, 0]
            mine = mine[torch.randperm(len(mine), generator=generator)][:890]
            cut = dict(zip(("base", "own", "validation", "test"), mine.split([60, 480, 100, 250]), strict=True))
            found.append({k: (x[at], y[at].long() - 5 * half) for k, at in cut.items()})
    return [*found, *({k: (-x.transpose(2, 3), y) for k, (x, y) in own.items()} for own in found)]


def train(
    trunk: Any,
    heads: list[nn.Linear],
    sets: list[tuple[int, tuple[Tensor, Tensor]]],
    rate: float,
    epochs: int,
    fixed: bool,
) -> None:
    """On batches of all sets in turn."""
    parameters = [*trunk.parameters(), *([] if fixed else (p for h in heads for p in h.parameters()))]
    optimiser = torch.optim.AdamW(parameters, lr=rate)
    for _ in range(epochs):
        batches = [(i, x[at], y[at]) for i, (x, y) in sets.items() for at in torch.randperm(len(x)).split(30)]
        for k in torch.randperm(len(batches)).tolist():
            i, x, y = batches[k]
            optimiser.zero_grad()
            cross_entropy(heads[i](trunk(x)), y).backward()
            optimiser.step()


def accuracies(trunk: dict[str, Tensor], heads: list[dict[str, Tensor]], data: list[Data], part: str) -> list[float]:
    found = []
    for head, own in zip(heads, data, strict=True):
        model = network().eval()
        model.load_state_dict({**trunk, **head})
        x, y = own[part]
        with torch.no_grad():
            found.append(float((model(x).argmax(1) == y).double().mean()))
    return found


def one(seed: int, folder: Path) -> list[tuple[str, list[float]]]:
    data = tasks(seed)
    torch.manual_seed(seed)
    trunk, heads = network(0), [nn.Linear(OPTIONS["embed_dim"], 5) for _ in TASKS]
    train(trunk, heads, {i: d["base"] for i, d in enumerate(data)}, 1e-3, 60, fixed=False)
    base = {k: v.clone() for k, v in trunk.state_dict().items()}
    own = [{f"head.{k}": v.detach().clone() for k, v in h.state_dict().items()} for h in heads]
    for name, head in (("base", own[0]), *((f"task{i}", h) for i, h in enumerate(own))):
        trunk.load_state_dict(base)
        torch.manual_seed(100 * seed + 1)
        if name != "base":
            i = int(name[-1])
            train(trunk, heads, {i: data[i]["own"]}, 3e-4, 10, fixed=True)
        (folder / name).mkdir()
        save_file({**trunk.state_dict(), **head}, folder / name / "model.safetensors")
        config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": OPTIONS}
        (folder / name / "config.json").write_text(json.dumps(config))
    paths = [folder / f"task{i}" for i in range(len(TASKS))]

    def scores(path: Path, part: str = "test") -> list[float]:
        return accuracies(load_file(path / "model.safetensors"), own, data, part)

    found = [("base", scores(folder / "base")), ("each fine-tune alone", [scores(p)[i] for i, p in enumerate(paths)])]
    common: dict[str, Any] = {"base": folder / "base", "skip": ["head.*"], "match": "never", "force": True}
    tried = {}
    for scale in GRID:
        out = folder / "arithmetic"
        mergeid.merge(paths, output=out, method="task_arithmetic", weights=[scale] * len(TASKS), **common)
        tried[scale] = (sum(scores(out, "validation")), scores(out))
    found.append(("task arithmetic, 0.3", tried[0.3][1]))
    found.append(("task arithmetic, chosen with labels", max(tried.values())[1]))
    given = {}
    for letter, part in zip(ascii_lowercase, data, strict=False):
        given[letter] = str(folder / f"{letter}.npz")
        np.savez(given[letter], x=part["test"][0].numpy())
    out = folder / "adamerging"
    result = mergeid.soup(
        paths, data=given, how="adamerging", steps=500, batch_size=16, limit=None, seed=seed, output=out, **common
    )
    print(seed, "entropy", result.entropy, [round(i.coefficient, 3) for i in result.ingredients], flush=True)
    found.append(("AdaMerging, no labels", scores(out)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    torch.set_num_threads(1)
    rows = list(csv.reader(TABLE.open()))[1:] if TABLE.exists() else []
    for seed in range(parser.parse_args().seeds):
        if any(int(r[0]) == seed for r in rows):
            continue
        with tempfile.TemporaryDirectory() as folder:
            for way, each in one(seed, Path(folder)):
                rows.append([str(seed), way, f"{sum(each) / len(TASKS):.4f}", *(f"{a:.4f}" for a in each)])
                print(rows[-1], flush=True)
        with TABLE.open("w", newline="") as file:
            csv.writer(file).writerows([["seed", "way", "mean", *TASKS], *rows])


if __name__ == "__main__":
    main()
