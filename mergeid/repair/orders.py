"""Which rows of a layer belong to which example.

Most networks keep the examples in the first dimension. Attention modules and recurrent layers may have the positions
there, and a layer that sees a flat list of rows does not say which it is. So one example of a batch is put in another's
place too: rows of the two are alike then, and unlike those of a third, in the right order alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mergeid.basics.nested import examples_in, mapped, named_tensors
from mergeid.basics.on_demand import OnDemand
from mergeid.plugins import Batch
from mergeid.repair.layers import layer_of
from mergeid.repair.paced import Forward, Paced, Stop

POSITIONS, FEW = 64, 11
"""Positions that are compared at most; examples that are enough. A prime seldom divides the positions, so that rows in
a wrong order are those of different examples."""
ALIKE = 0.05
"""Share of the difference between two examples up to which rows count as the same one's: more than 16 bits round."""


def outers(model: nn.Module, forward: Forward, batch: Batch, wanted: Sequence[Stop]) -> dict[int, int]:
    """Operation -> how its examples lie, as `mergeid.repair.layers.Order.outer`. Left out: those in which the rows of
    an example could not be found.

    Args:
        wanted: the operations, of a pass over this batch.
    """
    n = examples_in(batch)
    if n < 2:
        return {stop.index: 1 for stop in wanted}
    tensors = [t for t in named_tensors(batch).values() if t.dim() and len(t) == n]
    other = next((i for i in range(1, n) if any(not torch.equal(t[i], t[0]) for t in tensors)), 1)
    order = [0, 0, other, *(i for i in range(1, n) if i != other)]
    found: dict[int, int] = {}
    for size in dict.fromkeys((min(max(n, 3), FEW), max(n, 3))):
        try:
            found, whole = _seen(model, forward, _taken(batch, order[:size]), wanted)
        except (RuntimeError, LookupError, TypeError, ValueError):
            if size == n:
                raise
            found, whole = {stop.index: 1 for stop in wanted}, False  # a network for batches of two, as most have it
        if whole:
            break
    return found


def _taken(batch: Batch, index: Sequence[int]) -> Batch:
    n, at = examples_in(batch), torch.tensor(index)
    return mapped(batch, lambda t: t[at.to(t.device)] if t.dim() and len(t) == n else t)


def _seen(model: nn.Module, forward: Forward, batch: Batch, wanted: Sequence[Stop]) -> tuple[dict[int, int], bool]:
    """What is found in a batch whose first two examples are one and the same, and the third another one; and whether
    the pass is that of the operations wanted: other examples may make a network execute something else."""
    net = Paced(model, forward, batch, frozenset(stop.index for stop in wanted), after=True)
    found: dict[int, int] = {}
    try:
        for expected in wanted:
            stop = net.advance()
            if stop is None or stop.signature != expected.signature:
                return found, False
            outer = _outer(stop, examples_in(batch))
            if outer is not None:
                found[stop.index] = outer
    finally:
        net.close()
    return found, True


def _outer(stop: Stop, examples: int) -> int | None:
    shapes = [_unread(x) if i in stop.weights and isinstance(x, OnDemand) else x for i, x in enumerate(stop.args)]
    stop = replace(stop, args=shapes)
    layer = layer_of(stop, examples)
    if layer is None:
        return None
    positions = torch.linspace(0, layer.positions - 1, min(layer.positions, POSITIONS)).long()
    constant = False
    for outer in _orders(layer.positions):
        layer = layer_of(stop, examples, outer)
        if layer is None:
            continue
        x = layer.inputs(0, layer.source, positions)
        one, same, other = (x[i].double().nan_to_num(0.0, 0.0, 0.0) for i in range(3))
        error, gap = float((one - same).abs().max()), float((one - other).abs().max())
        if error <= ALIKE * gap and gap > 0:
            return outer
        constant |= outer == 1 and error == gap == 0
    return 1 if constant else None


def _orders(positions: int) -> Iterator[int]:
    """All that come into question, the likeliest first."""
    yield 1
    yield from (d for d in range(positions, 1, -1) if positions % d == 0)


def _unread(weight: Tensor) -> Tensor:
    """Room for its values: only the shape matters."""
    return torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device)
