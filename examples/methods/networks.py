"""Fashion-MNIST at 14 x 14 pixels, a multilayer perceptron and a small ResNet, and how they are trained.

Everything is small on purpose: what the methods claim is qualitative, and shows on networks that train in a minute.
"""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

MEAN, STD = 0.2860, 0.3530


class Images:
    """x [n, 1, 14, 14] normalised, y [n]; also a map-style data set for mergeid, {"arg0": x, "labels": y}."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"arg0": self.x[index], "labels": self.y[index]}

    def of(self, classes: range) -> Images:
        """The images of some classes, their labels counted from 0."""
        keep = (self.y >= classes.start) & (self.y < classes.stop)
        return Images(self.x[keep], self.y[keep] - classes.start)

    def part(self, start: int, stop: int) -> Images:
        return Images(self.x[start:stop], self.y[start:stop])


def fashion(folder: Path, split: str, count: int) -> Images:
    paths = [folder / f"{split}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    if not paths[0].exists():
        sys.exit(f"{paths[0]} is missing: `apt-get install dataset-fashion-mnist` brings it, or pass --data FOLDER")
    pixels = np.frombuffer(gzip.decompress(paths[0].read_bytes()), np.uint8, offset=16).copy().reshape(-1, 1, 28, 28)
    labels = np.frombuffer(gzip.decompress(paths[1].read_bytes()), np.uint8, offset=8).copy()
    small = F.avg_pool2d(torch.from_numpy(pixels[:count]).float() / 255, 2)
    return Images((small - MEAN) / STD, torch.from_numpy(labels[:count]).long())


def perceptron(width: int = 256, classes: int = 10) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(196, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def convolutions(width: int = 16, classes: int = 10) -> nn.Module:
    layers: list[nn.Module] = []
    for n, m, stride in ((1, 1, 1), (1, 2, 2), (2, 2, 1), (2, 4, 2), (4, 4, 1)):
        inputs = n * width if layers else 1
        layers += [nn.Conv2d(inputs, m * width, 3, stride, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * width, classes))


class Block(nn.Module):
    def __init__(self, n: int, m: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n, m, 3, stride, 1, bias=False), nn.BatchNorm2d(m)
        self.conv2, self.bn2 = nn.Conv2d(m, m, 3, 1, 1, bias=False), nn.BatchNorm2d(m)
        self.down = nn.Sequential(nn.Conv2d(n, m, 1, stride, bias=False), nn.BatchNorm2d(m)) if n != m else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.down is None else self.down(x)))


class ResNet(nn.Module):
    def __init__(self, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.block1 = Block(width, width, 1)
        self.block2 = Block(width, 2 * width, 2)
        self.block3 = Block(2 * width, 4 * width, 2)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block3(self.block2(self.block1(self.stem(x)))).mean((2, 3)))


Loss = Callable[[Tensor, Tensor], Tensor]


def train(
    model: nn.Module, images: Images, *, seed: int, epochs: int, rate: float = 2e-3, loss_of: Loss = F.cross_entropy
) -> nn.Module:
    """AdamW on a one-cycle schedule; the seed decides the order of the images."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    steps = epochs * (len(images) // 100)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=generator).split(100)[: len(images) // 100]:
            loss = loss_of(model(images.x[index]), images.y[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return model.eval()


def kept(path: Path, model: nn.Module, images: Images, *, seed: int, epochs: int, rate: float = 2e-3) -> nn.Module:
    """The trained model, from its file if it was trained before."""
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    train(model, images, seed=seed, epochs=epochs, rate=rate)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, partial)
    partial.replace(path)
    return model


def seeded(make: type[nn.Module] | object, seed: int, **how: int) -> nn.Module:
    torch.manual_seed(seed)
    return make(**how)  # type: ignore[operator]


def accuracy(logits: Tensor, y: Tensor) -> float:
    return float((logits.argmax(1) == y).float().mean())


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part) for part in x.split(500)])
