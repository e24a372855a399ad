"""Sums of squares of large tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from mergeid.basics.on_demand import in_pieces

BLOCK = 4096
"""Numbers whose squares are added up before float64 takes over."""


def squares_of(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Σ x², Σ y² and Σ (x - y)² of weights of one shape, in float32 at least."""
    found = [0.0, 0.0, 0.0]
    for part in in_pieces(x, y):
        one, two = (t.float() if t.element_size() < 4 else t for t in part)
        for i, value in enumerate((one, two, one - two)):
            found[i] += sum_of_squares(value)
    return found[0], found[1], found[2]


def sum_of_squares(x: Tensor) -> float:
    """Σ x²: blocks in the tensor's own precision, their sum in float64."""
    flat = x.reshape(-1)
    whole = len(flat) // BLOCK * BLOCK
    parts = (flat[:whole].view(-1, BLOCK), flat[whole:].view(1, -1))
    return sum(float(torch.linalg.vector_norm(p, dim=1).double().square().sum()) for p in parts if p.numel())
