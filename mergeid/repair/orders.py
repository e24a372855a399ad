"""Which rows of a layer belong to which example.

Most networks keep the examples in the first dimension. Attention modules and recurrent layers may have the positions
there, and a layer that sees a flat list of rows does not say which it is. So one example of a batch is put in another's
place too: rows of the two are alike then, and unlike those of a third, in the right order alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from mergeid.basics.nested import examples_in, mapped, named_tensors
from mergeid.basics.on_demand import OnDemand
from mergeid.plugins import Batch
from mergeid.repair.layers import answer_of, layer_of
from mergeid.repair.paced import Forward, Paced, Stop

POSITIONS = 64
"""That are compared at most."""
ALIKE = 0.05
"""Share of the difference between two examples up to which rows count as the same one's: more than 16 bits round."""


def outers(model: nn.Module, forward: Forward, batch: Batch, wanted: Collection[int]) -> dict[int, int]:
    """Operation -> how its examples lie, as `mergeid.repair.layers.Order.outer`. Left out: those in which the rows of
    an example could not be found."""
    n = examples_in(batch)
    if n < 2:
        return dict.fromkeys(wanted, 1)
    tensors = [t for t in named_tensors(batch).values() if t.dim() and len(t) == n]
    other = next((i for i in range(1, n) if any(not torch.equal(t[i], t[0]) for t in tensors)), 1)
    index = torch.arange(max(n, 3))
    again = 1 if other != 1 else 2
    index[again] = 0
    twice = mapped(batch, lambda t: t[index.to(t.device)] if t.dim() and len(t) == n else t)
    net = Paced(model, forward, twice, frozenset(wanted), after=True)
    found: dict[int, int] = {}
    try:
        while (stop := net.advance()) is not None:
            outer = _outer(stop, len(index), (0, again, other))
            if outer is not None:
                found[stop.index] = outer
    except (RuntimeError, LookupError, TypeError, ValueError):
        if len(index) == n:
            raise
        return dict.fromkeys(wanted, 1)  # a network for batches of two alone: as most have it
    finally:
        net.close()
    return found


def _outer(stop: Stop, examples: int, which: tuple[int, int, int]) -> int | None:
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
        x, _ = layer.rows(0, layer.source, answer_of(stop), positions)
        one, same, other = (x[i].double().nan_to_num(0.0, 0.0, 0.0) for i in which)
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
