"""What pays when: soups, AdaMerging and fixed coefficients on small real cases, written to tables/what_pays.csv.

    python tests/bench/what_pays.py --seeds 3

Handwritten digits (scikit-learn's), a small ViT (timm's ``test_vit``). *Same task*: eight fine-tunes of one base on all
digits with other learning rates, lengths and orders (model soups' case). *Different tasks*: five fine-tunes, each on
two of the ten digits, judged on all ten (task arithmetic's case). Coefficients are chosen on the validation set,
AdaMerging gets its images without labels; all figures are of a test set that nothing was chosen on. Finished seeds are
kept.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

import mergeid

TABLE = Path(__file__).parent / "tables" / "what_pays.csv"
GRID = (0.2, 0.4, 0.7, 1.0)


def network(state: dict[str, Tensor] | None = None) -> Any:
    model = timm.create_model("test_vit", img_size=32, patch_size=8, in_chans=1, num_classes=10)
    if state is not None:
        model.load_state_dict(state)
    return model


def trained(state: dict[str, Tensor], data: tuple[Tensor, Tensor], rate: float, epochs: int, seed: int) -> Any:
    torch.manual_seed(seed)
    model, (x, y) = network(state).train(), data
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(epochs):
        for at in torch.randperm(len(x)).split(32):
            optimiser.zero_grad()
            cross_entropy(model(x[at]), y[at]).backward()
            optimiser.step()
    return model.eval().state_dict()


def accuracy(state: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return float((network(state).eval()(data[0]).argmax(1) == data[1]).double().mean())


def one(seed: int, folder: Path) -> list[tuple[str, str, float]]:
    options = {"img_size": 32, "patch_size": 8, "in_chans": 1}
    config = {"architecture": "test_vit", "num_classes": 10, "model_args": options}
    (folder / "config.json").write_text(json.dumps(config))
    digits = load_digits()
    x = interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, 32, mode="bilinear")
    y, order = torch.tensor(digits.target), torch.randperm(1797, generator=torch.Generator().manual_seed(seed))
    first, own, validation, test = (
        (x[at], y[at]) for at in (order[:300], order[300:1000], order[1000:1300], order[1300:])
    )
    torch.manual_seed(seed)
    base = trained(network().state_dict(), first, 1e-3, 12, seed)
    save_file(base, folder / "base.safetensors")
    found = [("same task", "base", accuracy(base, test))]

    paths, settings = [], [(1e-4, 4), (3e-4, 4), (1e-3, 4), (3e-3, 4), (1e-4, 8), (3e-4, 8), (1e-3, 8), (6e-3, 6)]
    for i, (rate, epochs) in enumerate(settings):
        paths.append(folder / f"same{i}.safetensors")
        save_file(trained(base, own, rate, epochs, 100 * seed + i), paths[-1])
    alone = [(accuracy(load_file(p), validation), accuracy(load_file(p), test)) for p in paths]
    found.append(("same task", "best single", max(alone)[1]))
    for how in ("uniform", "greedy"):
        out = folder / f"{how}.safetensors"
        mergeid.soup(paths, data=validation, how=how, output=out, match="never")
        found.append(("same task", f"{how} soup", accuracy(load_file(out), test)))

    paths = []
    for i in range(5):
        mine = (own[1] // 2) == i
        paths.append(folder / f"task{i}.safetensors")
        save_file(trained(base, (own[0][mine], own[1][mine]), 3e-4, 6, 100 * seed + i), paths[-1])
    found.append(("different tasks", "base", accuracy(base, test)))
    means = [accuracy(load_file(p), test) for p in paths]
    found.append(("different tasks", "single, mean", sum(means) / 5))
    common: dict[str, Any] = {"base": folder / "base.safetensors", "match": "never"}
    for name, method, more in (
        ("task arithmetic", "task_arithmetic", {}),
        ("TIES", "ties", {"density": 0.2}),
        ("Iso-C", "iso_c", {}),
        ("TSV", "tsv", {}),
    ):
        tried = []
        for scale in GRID if method in ("task_arithmetic", "ties") else (1.0,):
            out = folder / f"{method}{scale}.safetensors"
            weights = [scale] * 5 if method == "task_arithmetic" else None
            settings_of = {"parameters": {"lambda": scale}} if method == "ties" else {}
            mergeid.merge(paths, output=out, method=method, weights=weights, **more, **settings_of, **common)
            tried.append((accuracy(load_file(out), validation), accuracy(load_file(out), test)))
        found.append(("different tasks", name, max(tried)[1]))
    out = folder / "ada.safetensors"
    mergeid.soup(paths, data=validation, how="adamerging", steps=200, output=out, **common)
    found.append(("different tasks", "AdaMerging, no labels", accuracy(load_file(out), test)))
    begin = folder / "begin.safetensors"
    mergeid.merge(paths, output=begin, method="task_arithmetic", weights=[0.3] * 5, **common)
    found.append(("different tasks", "task arithmetic, 0.3", accuracy(load_file(begin), test)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    rows = list(csv.reader(TABLE.open()))[1:] if TABLE.exists() else []
    for seed in range(seeds):
        if any(int(r[0]) == seed for r in rows):
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows += [[str(seed), *map(str, r[:2]), f"{r[2]:.4f}"] for r in one(seed, Path(folder))]
        with TABLE.open("w", newline="") as file:
            csv.writer(file).writerows([["seed", "case", "way", "accuracy"], *rows])


if __name__ == "__main__":
    main()
