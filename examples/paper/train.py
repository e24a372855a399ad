"""Training, once per network: a file in the cache is taken as it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from data import Split, load
from nets import VARIANTS, make
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from mergeid import nn as mnn


@dataclass(frozen=True)
class Budget:
    """How much a network is trained and measured; part of every file name and row, so that budgets never mix."""

    images: int
    epochs: int
    width: int
    test: int
    batch: int = 128
    rate: float = 1e-3

    def __str__(self) -> str:
        return f"{self.images}x{self.epochs}w{self.width}r{self.rate:g}"


@dataclass(frozen=True)
class Setting:
    """One cell of the grid."""

    experiment: str
    data: str
    net: str
    variant: str
    budget: Budget

    def split(self) -> Split:
        return load(self.data, self.budget.images, self.budget.test)

    @property
    def inputs(self) -> int:
        return self.split().x[0].numel()


def file_of(setting: Setting, seed: int, cache: Path) -> Path:
    """Where a trained network lies."""
    name = f"{setting.data}-{setting.net}-{setting.variant}-{setting.budget}-{seed}".replace(" ", "")
    return cache / f"{name}.safetensors"


def stored(setting: Setting, seed: int, cache: Path) -> dict[str, Tensor]:
    """A trained network with its fixed parts beside the trainable ones; trained first where the cache lacks it."""
    path = file_of(setting, seed, cache)
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(_train(setting, seed), partial)
        partial.replace(path)
    return load_file(path)


def state(setting: Setting, seed: int, cache: Path) -> dict[str, Tensor]:
    """The same, folded into ordinary weights."""
    return mnn.fold_state(stored(setting, seed, cache))


def _train(setting: Setting, seed: int) -> dict[str, Tensor]:
    """AdamW on a one-cycle schedule. The seed decides the initial trainable weights and the order of the examples."""
    budget, variant, split = setting.budget, VARIANTS[setting.variant], setting.split()
    model = make(setting.net, setting.inputs, budget.width, variant, seed).train()
    optimizer = torch.optim.AdamW(mnn.decay_groups(model, 0.01), lr=budget.rate)
    batches = max(1, len(split.x) // budget.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=budget.rate, total_steps=budget.epochs * batches)
    order = torch.Generator().manual_seed(seed)
    for _ in range(budget.epochs):
        for index in torch.randperm(len(split.x), generator=order).split(budget.batch)[:batches]:
            loss = F.cross_entropy(model(split.x[index]), split.labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return {k: v.contiguous() for k, v in model.state_dict().items()}
