"""Tables: scikit-learn's breast cancer, wine and digits (as 64 columns), and tables drawn by `make_classification`.

The columns are as they come, of any scale: the networks begin with a BatchNorm. Every second row of a shipped table is
for testing; of drawn ones as many as `TESTED`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn


@dataclass(frozen=True)
class Drawn:
    """A drawn table.

    Attributes:
        rows, columns, classes: its size; the rows are those for training.
        noise: share of wrong labels.
        heavy: whether the columns are made long-tailed.
    """

    rows: int
    columns: int
    classes: int
    noise: float = 0.0
    heavy: bool = False


DRAWN = {
    "wide": Drawn(4000, 40, 5),
    "noisy": Drawn(3000, 20, 3, noise=0.2),
    "heavy": Drawn(4000, 20, 4, heavy=True),
    "few": Drawn(500, 12, 2),
    "many": Drawn(6000, 30, 10, noise=0.05),
    "tails": Drawn(2000, 16, 2, noise=0.1, heavy=True),
}
TESTED = 4000
REAL = {"cancer": (30, 2), "wine": (13, 3), "columns": (64, 10)}
"""Columns and classes of the tables that scikit-learn ships."""
TABLES = (*REAL, *DRAWN)


def size(table: str) -> tuple[int, int]:
    """(columns, classes)."""
    return REAL[table] if table in REAL else (DRAWN[table].columns, DRAWN[table].classes)


@cache
def rows(table: str) -> tuple[np.ndarray, np.ndarray]:
    """float32 [rows, columns] and int64 [rows], shuffled."""
    import sklearn.datasets as sets

    found: dict[str, Any] = {"cancer": sets.load_breast_cancer, "wine": sets.load_wine, "columns": sets.load_digits}
    if table in found:
        x, y = found[table](return_X_y=True)
    else:
        made = DRAWN[table]
        x, y = sets.make_classification(
            made.rows + TESTED,
            made.columns,
            n_informative=made.columns // 2,
            n_redundant=made.columns // 4,
            n_classes=made.classes,
            n_clusters_per_class=2,
            flip_y=made.noise,
            class_sep=1.0,
            random_state=0,
        )
        x = np.sign(x) * np.expm1(np.abs(x) / 2) if made.heavy else x
    order = np.random.default_rng(0).permutation(len(x))
    return x[order].astype(np.float32), y[order].astype(np.int64)


def network(columns: int, width: int, depth: int, classes: int) -> nn.Module:
    """BatchNorm of the columns, then `depth` times Linear, BatchNorm and ReLU, and the head."""
    layers: list[nn.Module] = [nn.BatchNorm1d(columns)]
    inputs = columns
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


def split(table: str) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """(inputs, labels) for training and for testing."""
    x, y = (torch.from_numpy(v) for v in rows(table))
    first, second = (slice(0, None, 2), slice(1, None, 2)) if table in REAL else (slice(-TESTED), slice(-TESTED, None))
    return (x[first], y[first]), (x[second], y[second])
