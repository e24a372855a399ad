"""W-asymmetric weights (Lim et al., "The Empirical Impact of Neural Parameter Symmetries, or Lack Thereof", 2024).

In every neuron a fixed number of entries is frozen at random values and the others are trained:
F = (1 − mask) ⊙ σ·N with N standard normal, D = mask ∈ {0, 1}. No two neurons have the same mask, so that no two of
them can trade places.
"""

from __future__ import annotations

from itertools import combinations
from math import comb, prod

import torch
from torch import Generator, Tensor

from mergeid.errors import MergeidError
from mergeid.nn.effective import Parts
from mergeid.nn.kinds import kind


def fixed_count(entries: int, fixed: float) -> int:
    """Fixed entries per neuron: a share in (0, 1) of the entries, rounded, or a whole number of them.

    Raises `MergeidError` unless at least one entry is fixed and one is free."""
    count = round(fixed * entries) if 0 < fixed < 1 else int(fixed)
    if not 0 < count < entries or (fixed >= 1 and count != fixed):
        raise MergeidError(
            f"fixed={fixed:g} leaves {count} of a neuron's {entries} weights fixed; expected at least one fixed and "
            "one free: give a share between 0 and 1 or a whole number"
        )
    return count


def distinct_masks(neurons: int, entries: int, count: int, generator: Generator) -> Tensor:
    """bool [neurons, entries]: True where trained; `count` False per row, no two rows equal, uniformly drawn.

    Raises `MergeidError` when there are fewer such masks than neurons."""
    possible = comb(entries, count)
    if possible < neurons:
        raise MergeidError(
            f"{neurons} neurons need distinct masks, but {entries} weights with {count} fixed give only {possible}; "
            "choose another `fixed`, or leave the layer out"
        )
    if possible <= 4 * neurons:
        table = list(combinations(range(entries), count))
        chosen = torch.randperm(possible, generator=generator)[:neurons]
        at = torch.tensor(table, dtype=torch.int64)[chosen]
    else:
        at = torch.rand(neurons, entries, generator=generator).argsort(1)[:, :count].sort(1).values
        seen: set[tuple[int, ...]] = set()
        for i in range(neurons):
            while (key := tuple(at[i].tolist())) in seen:
                at[i] = torch.randperm(entries, generator=generator)[:count].sort().values
            seen.add(key)
    return torch.ones(neurons, entries, dtype=torch.bool).scatter_(1, at, False)


@kind("w", sigma=1.0, biases=False)
def w_parts(parameter: Tensor, axis: int, *, sigma: float, fixed: float, generator: Generator) -> Parts:
    """F and D of W-asymmetric weights.

    Args:
        fixed: share of fixed entries per neuron in (0, 1), or their number.

    Raises `MergeidError` where the neurons cannot have distinct masks."""
    shape = (parameter.shape[axis], *(n for d, n in enumerate(parameter.shape) if d != axis))
    neurons, entries = shape[0], prod(shape[1:])
    free = distinct_masks(neurons, entries, fixed_count(entries, fixed), generator)
    noise = torch.randn(neurons, entries, generator=generator)
    frozen = torch.where(free, torch.zeros(()), sigma * noise)
    return Parts(*(t.float().reshape(shape).movedim(0, axis).contiguous() for t in (frozen, free)))
