"""Which operations have weights of their own: a weight that is used twice cannot suit both places."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

import torch
from torch import nn

from mergeid.basics.on_demand import memory_of
from mergeid.basics.state import tensors_of
from mergeid.repair.beyond import NORMS
from mergeid.repair.layers import KINDS
from mergeid.repair.made import Place
from mergeid.repair.paced import Stop, parameters_of

STATISTICS = (3, 4)
"""Arguments of a batch norm that hold running statistics, which stay as they are."""


def solvable(model: nn.Module, seen: Sequence[Stop], frozen: Collection[str]) -> list[Stop]:
    """The operations of a kind that can be solved whose weights are parameters, not frozen, and used nowhere else.

    Args:
        seen: the operations of one pass on its weights and activations.
        frozen: keys of the state dict that stay as they are.
    """
    fitted = parameters_of(model)
    state = tensors_of(model, keep_vars=True)
    still = {memory_of(state[k]) for k in frozen}
    uses: dict[str, list[tuple[tuple[int, int], Place]]] = defaultdict(list)
    for stop in seen:
        for at, places in stop.places.items():
            for place in places:
                uses[place.name].append(((stop.index, at), place))

    def own(use: tuple[int, int], place: Place) -> bool:
        elsewhere = (other for where, other in uses[place.name] if where != use)
        return memory_of(state[place.name]) not in still and not any(overlap(place, other) for other in elsewhere)

    def free(stop: Stop, at: int, places: Sequence[Place]) -> bool:
        if at in STATISTICS and stop.name in NORMS:
            return True
        parameters = [place for place in places if place.name in fitted]
        return bool(parameters) and all(own((stop.index, at), place) for place in parameters)

    return [stop for stop in seen if stop.name in KINDS and all(free(stop, at, p) for at, p in stop.places.items())]


def overlap(one: Place, other: Place) -> bool:
    """Whether two parts of one weight have entries in common."""
    if one == other:
        return True
    begin = max(one.offset, other.offset)
    end = min(_end(one), _end(other))
    if begin >= end or not _filled(one) or not _filled(other):
        return begin < end and bool((_taken(one, begin, end) & _taken(other, begin, end)).any())
    return True


def _end(place: Place) -> int:
    return place.offset + 1 + sum((n - 1) * step for n, step in zip(place.shape, place.stride, strict=True))


def _filled(place: Place) -> bool:
    """Whether nothing lies between its entries."""
    count = 1
    for n, step in zip(place.shape, place.stride, strict=True):
        count *= n if step else 1
    return count == _end(place) - place.offset


def _taken(place: Place, begin: int, end: int) -> torch.Tensor:
    """bool [end - begin]: which entries of the memory it has."""
    taken = torch.zeros(_end(place) - place.offset, dtype=torch.bool)
    shape = [n if step else 1 for n, step in zip(place.shape, place.stride, strict=True)]
    taken.as_strided(shape, place.stride).fill_(True)
    return taken[begin - place.offset : end - place.offset]
