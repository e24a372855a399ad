"""What a network executes, looked up once for all batches of one shape."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mergeid.basics.nested import named_tensors
from mergeid.plugins import Batch
from mergeid.repair.beyond import Beyond, beyond
from mergeid.repair.orders import outers
from mergeid.repair.paced import Forward, Stop, record
from mergeid.repair.uses import solvable


@dataclass(frozen=True)
class Layout:
    """Of a pass over a batch of one shape.

    Attributes:
        solvable: the operations that can be solved, in order of execution.
        beyond: number of an operation on weights -> the map behind it, where there is more than views.
        outers: number of one that can be solved -> how its examples lie (`mergeid.repair.layers.Order.outer`).
    """

    solvable: list[Stop]
    beyond: dict[int, Beyond]
    outers: dict[int, int]


def layouts(model: nn.Module, forward: Forward, batches: Sequence[Batch], frozen: Collection[str]) -> list[Layout]:
    """One for every batch.

    Args:
        frozen: keys of the state dict that stay as they are.
    """
    known: dict[Any, Layout] = {}
    found = []
    for batch in batches:
        key = tuple((k, tuple(v.shape)) for k, v in named_tensors(batch).items())
        if key not in known:
            known[key] = _layout(model, forward, batch, frozen)
        found.append(known[key])
    return found


def _layout(model: nn.Module, forward: Forward, batch: Batch, frozen: Collection[str]) -> Layout:
    seen = record(model, forward, batch)
    stops = solvable(model, seen.stops, frozen)
    return Layout(stops, beyond(seen.nodes), outers(model, forward, batch, stops))
