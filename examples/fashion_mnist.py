"""Two ResNet-18 from independent seeds on Fashion-MNIST: what does averaging them cost, and what does matching save?

    python examples/fashion_mnist.py --out fmnist

trains two timm networks (no pretrained weights; about two minutes each on one core), saves a.safetensors and
b.safetensors in the output folder, merges them directly, with every space matched, and as mergeid decides, and
reports loss and accuracy on the test images, each with and without re-estimated BatchNorm statistics. Beside them is
what `mergeid merge --data` makes of 512 unlabelled images by default, which may also solve for the weights.
Then it measures the barrier along the whole line, and says how much of the direct average's barrier matching closes.
Everything lies in the output folder: the merged checkpoints, report.json, barrier.png. A second run reuses what is
there. The data comes from Debian:

    apt-get install dataset-fashion-mnist
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import mergeid
from mergeid.evaluate.measure import Metrics, evaluate
from mergeid.repair.batchnorm import calibration_batches, reestimate_batchnorm
from mergeid.reporting.plots import plot_barriers
from mergeid.reporting.tables import Column, barrier_summary, number, percent, show

DATA = Path("/usr/share/datasets/fashion-mnist")
ARCHITECTURE = "resnet18"
MODES = {"never": "direct", "always": "always match", "auto": "mergeid"}
MEAN, STD = 0.2860, 0.3530  # of the training pixels


class Images(Dataset):
    """Fashion-MNIST as {"x": [1, 32, 32] normalised, "labels": class}; the 28 px images are padded to 32."""

    def __init__(self, folder: Path, split: str, start: int = 0, stop: int | None = None) -> None:
        pixels = _read_idx(folder / f"{split}-images-idx3-ubyte.gz", header=16).reshape(-1, 1, 28, 28)
        labels = _read_idx(folder / f"{split}-labels-idx1-ubyte.gz", header=8)
        scaled = F.pad(torch.from_numpy(pixels[start:stop]).float() / 255, (2, 2, 2, 2))
        self.x = (scaled - MEAN) / STD
        self.labels = torch.from_numpy(labels[start:stop]).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.labels[index]}


def _read_idx(path: Path, header: int) -> np.ndarray:
    if not path.exists():
        sys.exit(f"{path} is missing: `apt-get install dataset-fashion-mnist` brings it, or pass --data FOLDER")
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header).copy()


def train(train_set: Images, seed: int, epochs: int, batch_size: int = 128, rate: float = 1e-3) -> nn.Module:
    """AdamW on a one-cycle schedule; the seed decides the initial weights and the order of the images."""
    torch.manual_seed(seed)
    model = timm.create_model(ARCHITECTURE, pretrained=False, in_chans=1, num_classes=10).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    steps = epochs * (len(train_set) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    for epoch in range(epochs):
        start, total = time.perf_counter(), 0.0
        order = torch.randperm(len(train_set)).split(batch_size)
        for index in order[: len(train_set) // batch_size]:
            loss = F.cross_entropy(model(train_set.x[index]), train_set.labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        seconds = time.perf_counter() - start
        print(f"seed {seed}, epoch {epoch + 1}: training loss {total / (steps // epochs):.3f}, {seconds:.0f} s")
    return model.eval()


def checkpoint(path: Path, train_set: Images, seed: int, epochs: int) -> Path:
    """The trained network's file: the one that is there, if it was trained in the same way."""
    made = {"seed": str(seed), "epochs": str(epochs), "images": str(len(train_set)), "arch": ARCHITECTURE}
    if path.exists():
        with safe_open(path, "pt") as file:
            there = file.metadata() or {}
        if any(there.get(key) != value for key, value in made.items()):
            sys.exit(f"{path} was trained with other options ({there}); delete it or choose another --out")
        print(f"{path} is there already")
        return path
    model = train(train_set, seed, epochs)
    partial = path.with_suffix(".partial")
    save_file(model.state_dict(), partial, metadata={"format": "pt", **made})
    partial.replace(path)
    return path


def score(path: Path, test_set: Images, calibration: Images | None) -> Metrics:
    """Test loss and accuracy of a checkpoint, BatchNorm statistics re-estimated first if there is calibration data."""
    loaded = mergeid.load(path, arch=f"timm/{ARCHITECTURE}")
    if calibration is not None:
        batches = calibration_batches(loaded.model, calibration, forward=loaded.forward)
        reestimate_batchnorm(loaded.model, batches, forward=loaded.forward)
    return evaluate(
        loaded.model,
        test_set,
        forward=loaded.forward,
        loss=lambda output, batch: loaded.adapter.loss(loaded.arch, output, batch),
        batch_size=250,
    )


def merged(folder: Path, mode: str, calibration: Images, repair: str, limit: int | None = None) -> Path:
    """A merge of a and b on disk. `force` replaces the last run's file; it would also merge against a verdict."""
    result = mergeid.merge(
        folder / "a.safetensors",
        folder / "b.safetensors",
        output=folder / f"{mode}-{repair}.safetensors",
        match=mode,
        data=calibration,
        limit=limit,
        repair=repair,
        arch=f"timm/{ARCHITECTURE}",
        force=True,
    )
    print(f"merged with match={mode}, repair={repair}: {result.verdict}", flush=True)
    return result.files[0]


def report(folder: Path, test_set: Images, calibration: Images, points: int) -> dict[str, Any]:
    """Scores of the five networks, barriers of the three lines; printed, and as JSON."""
    scores = {}
    for name in ("a", "b"):
        path = folder / f"{name}.safetensors"
        scores[name] = [score(path, test_set, None), score(path, test_set, calibration)]
    for mode, name in MODES.items():
        # The repaired merge carries its own statistics, so that it is scored as it lies on disk.
        scores[name] = [score(merged(folder, mode, calibration, repair), test_set, None) for repair in ("none", "bn")]
    scores["default"] = [score(merged(folder, "auto", calibration, "auto", 512), test_set, None)] * 2
    curves = [
        mergeid.barrier(
            folder / "a.safetensors",
            folder / "b.safetensors",
            data=test_set,
            calibration=calibration,
            calibration_limit=None,
            match=mode,
            repair=True,
            points=points,
            arch=f"timm/{ARCHITECTURE}",
            batch_size=250,
            resume=folder / "points.json",
            label=name,
        )
        for mode, name in MODES.items()
    ]
    closed = 1 - curves[-1].barrier / curves[0].barrier if curves[0].barrier else None
    console = Console()
    columns = [Column(""), *(Column(head, "right") for head in ("loss", "accuracy", "loss, BN", "accuracy, BN"))]
    rows = [
        [name, number(plain.loss), percent(plain.accuracy), number(again.loss), percent(again.accuracy)]
        for name, (plain, again) in scores.items()
    ]
    print()
    about = f"{len(test_set):,} test images; BN: statistics re-estimated on {len(calibration):,} training images"
    show(columns, rows, title="Networks, and merges at the midpoint", caption=about, console=console)
    print()
    console.print(barrier_summary(curves, width=console.width, title="Barriers, BatchNorm re-estimated"))
    a, b, default = (scores[name][0].accuracy or 0.0 for name in ("a", "b", "default"))
    below = (a + b) / 2 - default
    print(f"\nmatching closes {percent(closed)} of the barrier of the direct average with the same re-estimation")
    print(f"`merge --data` loses {100 * below:.2f} points of accuracy against the mean of the two networks")
    plot_barriers(curves, folder / "barrier.png", f"{ARCHITECTURE} on Fashion-MNIST, BatchNorm re-estimated")
    return {
        "scores": {name: {"averaged": asdict(x), "re-estimated": asdict(y)} for name, (x, y) in scores.items()},
        "barriers": [curve.to_json() for curve in curves],
        "share_of_barrier_closed": closed,
        "calibration": len(calibration),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("fmnist"), help="folder for everything written")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the four idx.gz files")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=12_000, help="training images (at most 60000)")
    parser.add_argument("--calibration", type=int, default=1_000, help="training images to match and re-estimate on")
    parser.add_argument("--test", type=int, default=10_000, help="test images")
    parser.add_argument("--points", type=int, default=11, help="points on the line from a to b")
    parser.add_argument("--train-only", action="store_true", help="stop when the two checkpoints are there")
    parser.add_argument("--threads", type=int, help="CPU threads (all by default)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)

    train_set = Images(options.data, "train", stop=options.images)
    for name, seed in (("a", 1), ("b", 2)):
        checkpoint(options.out / f"{name}.safetensors", train_set, seed, options.epochs)
    if options.train_only:
        return
    test_set = Images(options.data, "t10k", stop=options.test)
    calibration = Images(options.data, "train", stop=options.calibration)
    found = report(options.out, test_set, calibration, options.points)
    (options.out / "report.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"details in {options.out}/report.json, the curves in {options.out}/barrier.png")


if __name__ == "__main__":
    main()
