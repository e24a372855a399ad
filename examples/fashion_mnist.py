"""Two ResNet-18 from independent seeds on Fashion-MNIST: what does averaging them cost, and what does matching save?

    python examples/fashion_mnist.py --out fmnist

trains two timm networks (no pretrained weights; about two minutes each on one core), saves a.safetensors and
b.safetensors in the output folder, merges them directly, with every layer matched, and as mergeid decides, and
reports loss and accuracy on the test images, each with and without re-estimated BatchNorm statistics. A second run
reuses the two checkpoints. The data comes from Debian:

    apt-get install dataset-fashion-mnist
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

DATA = Path("/usr/share/datasets/fashion-mnist")
ARCHITECTURE = "resnet18"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("fmnist"), help="folder for everything written")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the four idx.gz files")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=12_000, help="training images (at most 60000)")
    parser.add_argument("--threads", type=int, help="CPU threads (all by default)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)

    train_set = Images(options.data, "train", stop=options.images)
    for name, seed in (("a", 1), ("b", 2)):
        checkpoint(options.out / f"{name}.safetensors", train_set, seed, options.epochs)


if __name__ == "__main__":
    main()
