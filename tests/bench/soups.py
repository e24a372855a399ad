"""The claim of model soups (arXiv:2203.05482) on a small real case, written to tables/soups.csv.

    apt-get install dataset-fashion-mnist
    python tests/bench/soups.py --seeds 3

A small ViT is trained on 2,000 images of Fashion-MNIST, and eight copies are fine-tuned on 1,000 others with other
rates, lengths, shifts of the images and orders: fine-tunes of one trained base, as in the paper. The best single model
and the greedy soup are chosen on 500 validation images; accuracies are of 5,000 test images.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
from adamerging import OPTIONS, fashion
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

import mergeid

TABLE = Path(__file__).parent / "tables" / "soups.csv"
GRIDS = {
    "mixed": [(rate, epochs, shift) for rate in (1e-4, 3e-4) for epochs in (5, 10) for shift in (0, 2)],
    "alike": [(rate, 10, shift) for rate in (3e-4, 4e-4, 5e-4, 6e-4) for shift in (1, 2)],
}
"""Rates of AdamW, epochs, and the most pixels by which a training image is moved: fine-tunes that are good and bad, and
such that are about as good as each other."""


def network() -> Any:
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **OPTIONS)


def train(state: dict[str, Tensor], data: tuple[Tensor, Tensor], told: tuple[float, int, int], seed: int) -> Any:
    rate, epochs, shift = told
    torch.manual_seed(seed)
    model, (x, y) = network().train(), data
    model.load_state_dict(state)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(epochs):
        for at in torch.randperm(len(x)).split(32):
            by = torch.randint(-shift, shift + 1, (2,)).tolist()
            optimiser.zero_grad()
            cross_entropy(model(x[at].roll(by, (2, 3))), y[at]).backward()
            optimiser.step()
    return model.state_dict()


def accuracy(state: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> float:
    model = network().eval()
    model.load_state_dict(state)
    with torch.no_grad():
        right = [(model(x).argmax(1) == y).double().sum() for x, y in zip(*(t.split(500) for t in data), strict=True)]
    return float(sum(right)) / len(data[0])


def one(seed: int, grid: str, folder: Path) -> list[tuple[str, float]]:
    x, y = fashion()
    cut = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:8500].split([2000, 1000, 500, 5000])
    first, own, validation, test = ((x[at], y[at]) for at in cut)
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 10, "model_args": OPTIONS}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    base = train(network().state_dict(), first, (1e-3, 15, 0), seed)
    paths = []
    for i, told in enumerate(GRIDS[grid]):
        paths.append(folder / f"{i}.safetensors")
        save_file(train(base, own, told, 100 * seed + i), paths[-1])
    alone = [(accuracy(load_file(p), validation), accuracy(load_file(p), test)) for p in paths]
    found = [
        ("base", accuracy(base, test)),
        ("single, mean", sum(t for _, t in alone) / len(alone)),
        ("single, best on validation", max(alone)[1]),
        ("single, best on test", max(t for _, t in alone)),
    ]
    for how in ("uniform", "greedy"):
        out = folder / f"{how}.safetensors"
        result = mergeid.soup(paths, data=validation, how=how, output=out, match="never")
        found.append((f"{how} soup", accuracy(load_file(out), test)))
        print(seed, how, [i.kept for i in result.ingredients], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--grids", nargs="+", default=list(GRIDS), choices=GRIDS)
    torch.set_num_threads(1)
    rows = list(csv.reader(TABLE.open()))[1:] if TABLE.exists() else []
    told = parser.parse_args()
    for seed, grid in product(range(told.seeds), told.grids):
        if any(r[:2] == [str(seed), grid] for r in rows):
            continue
        with tempfile.TemporaryDirectory() as folder:
            for way, score in one(seed, grid, Path(folder)):
                rows.append([str(seed), grid, way, f"{score:.4f}"])
                print(rows[-1], flush=True)
        with TABLE.open("w", newline="") as file:
            csv.writer(file).writerows([["seed", "fine-tunes", "way", "accuracy"], *rows])


if __name__ == "__main__":
    main()
