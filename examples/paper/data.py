"""The data sets: MNIST digits, Fashion-MNIST, and Gaussian inputs on a subspace with labels of a random teacher."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from pictures import fashion, mnist
from torch import Tensor
from torch.utils.data import TensorDataset

DIMENSION = 128
"""Input dimension of the Gaussian data."""


@dataclass(frozen=True)
class Split:
    """Inputs float32 [examples, …] and labels int64 [examples] for training and testing."""

    x: Tensor
    labels: Tensor
    test_x: Tensor
    test_labels: Tensor

    def test(self) -> TensorDataset:
        return TensorDataset(self.test_x, self.test_labels)


@cache
def load(name: str, images: int, test: int) -> Split:
    """A data set by name: ``mnist``, ``fashion``, ``gauss-K`` or ``gauss-K-T`` (K intrinsic dimensions; T in [0, 1]
    turns the subspace from coordinate axes to a random one, 1 if left out)."""
    if name.startswith("gauss-"):
        parts = name.split("-")
        return gaussian(int(parts[1]), float(parts[2]) if len(parts) > 2 else 1.0, images, test)
    if name == "mnist":
        x, labels = mnist()
    else:
        x, labels = fashion("train")
    if name == "fashion":
        test_x, test_labels = fashion("t10k")
        return _standardised(x[:images], labels[:images], test_x[:test], test_labels[:test])
    return _standardised(x[:images], labels[:images], x[-test:], labels[-test:])


def gaussian(k: int, turn: float, images: int, test: int) -> Split:
    """x = U z with z standard normal in k dimensions, labels by a random network of z with 10 classes.

    U has orthonormal columns; ‖x‖² is d in the mean, whatever k, so that layers see inputs of one scale."""
    z = torch.randn(images + test, k, generator=torch.Generator().manual_seed(10 + k))
    x = z @ subspace(k, turn).T * (DIMENSION / k) ** 0.5
    teacher = torch.Generator().manual_seed(20 + k)
    hidden = torch.tanh(z @ torch.randn(k, 64, generator=teacher) / k**0.5 * 2)
    scores = hidden @ torch.randn(64, 10, generator=teacher)
    scores -= scores.mean(0)
    labels = scores.argmax(1)
    return Split(x[:images], labels[:images], x[images:], labels[images:])


def subspace(k: int, turn: float) -> Tensor:
    """Orthonormal basis [DIMENSION, k] between the first k coordinate axes (`turn` = 0) and a random subspace (1)."""
    generator = torch.Generator().manual_seed(30 + k)
    spread = torch.linalg.qr(torch.randn(DIMENSION, k, generator=generator)).Q
    # the sign of each column is chosen so that the two bases do not cancel half-way
    axes = torch.eye(DIMENSION, k) * torch.where(torch.diagonal(spread) < 0, -1.0, 1.0)
    return torch.linalg.qr((1 - turn) * axes + turn * spread).Q


def coherence(basis: Tensor) -> float:
    """ν(U) = max over inputs a of ‖U_a‖², in [k/d, 1]."""
    return float(basis.square().sum(1).max())


def _standardised(x: np.ndarray, labels: np.ndarray, test_x: np.ndarray, test_labels: np.ndarray) -> Split:
    mean, std = float(x.mean()), float(x.std())
    inputs = (torch.from_numpy((v - mean) / std).float().reshape(-1, 1, 28, 28) for v in (x, test_x))
    return Split(next(inputs), torch.from_numpy(labels).long(), next(inputs), torch.from_numpy(test_labels).long())
