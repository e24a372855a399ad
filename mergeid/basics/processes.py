"""Work that the processes of one launch (``accelerate launch``, ``torchrun``) share out.

Every process runs the same program. What is shared is cut into items that depend on nothing but the input; each is
worked on by one process, and all processes get all answers in the order of the items. So nothing is added up in another
order than one process would, and the result is the same.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from mergeid.errors import MergeidError

Item = TypeVar("Item")
Answer = TypeVar("Answer")

_joined: ContextVar[bool] = ContextVar("joined", default=False)
_alone: ContextVar[bool] = ContextVar("alone", default=False)
_voice: list[bool] = []
"""Whether this process is the one that says what went wrong while they worked together; nothing where nothing did."""


def launched() -> int:
    """How many processes the launcher says that there are; 1 without one."""
    return _number("WORLD_SIZE", 1) if "LOCAL_RANK" in os.environ else 1


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return launched() == 1 or _number("RANK", 0) == 0


def speaks() -> bool:
    """Whether this process says what goes wrong: the first does, and while they work together the first to fall."""
    return _voice[-1] if _voice else is_first()


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else otherwise


@contextmanager
def _inside(state: ContextVar[bool]) -> Iterator[None]:
    token = state.set(True)
    try:
        yield
    finally:
        state.reset(token)


def together() -> AbstractContextManager[None]:
    """Work inside is shared out among the processes of a group that torch has been told of."""
    return _inside(_joined)


def fell() -> bool:
    """To be called where work that is shared out goes wrong here. What goes wrong in other processes afterwards is only
    that this one has left, so the one that fell first speaks. Returns whether it is this one."""
    from torch import distributed

    try:
        store: Any = distributed.distributed_c10d._get_default_store()
        first = bool(store.add("mergeid/fell", 1) == 1)
    except (AttributeError, RuntimeError, ValueError):  # no group, or the store has gone with a process
        first = is_first()
    _voice.append(first)
    return first


def alone() -> AbstractContextManager[None]:
    """Work inside is this process's own, and none of it is shared out again."""
    return _inside(_alone)


def is_alone() -> bool:
    """Inside of `alone`."""
    return _alone.get()


def place() -> tuple[int, int]:
    """The number of this process, and how many share the work."""
    distributed: Any = sys.modules.get("torch.distributed")
    if not _joined.get() or is_alone() or distributed is None or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def shared(
    items: Sequence[Item], work: Callable[[Item], Answer], parts: Callable[[Answer], Sequence[Answer]] | None = None
) -> list[Answer]:
    """What `work` makes of every item, each made by one process, on all processes.

    Args:
        parts: what each process is to have of an answer, in their order; default: each has all of it.

    Raises the `MergeidError` of the first item that has one, on all processes."""
    rank, world = place()
    if world == 1:
        return [work(item) for item in items]
    mine: dict[int, Answer] = {}
    wrong: tuple[int, MergeidError] | None = None
    with alone():
        for i in range(rank, len(items), world):
            try:
                mine[i] = work(items[i])
            except MergeidError as error:
                wrong = i, error
                break
    errors = [found for found in everyones(wrong) if found is not None]
    if errors:
        raise min(errors, key=lambda found: found[0])[1]
    owners = [i % world for i in range(len(items))]
    return collected(mine, owners) if parts is None else _sent(mine, owners, parts)


def _sent(mine: dict[int, Answer], owners: Sequence[int], parts: Callable[[Answer], Sequence[Answer]]) -> list[Answer]:
    """This process's part of every answer. The others' parts go to them alone."""
    from torch import distributed

    rank, world = place()
    found: list[Answer] = []
    for i, owner in enumerate(owners):
        if owner == rank:
            own = parts(mine[i])
            for other in range(world):
                if other != rank:
                    distributed.send_object_list([own[other]], dst=other)
            found.append(own[rank])
        else:
            carried: list[Any] = [None]
            distributed.recv_object_list(carried, src=owner)
            found.append(carried[0])
    return found


def in_turn(items: Sequence[Item], work: Callable[[Item], Answer]) -> Iterator[Answer]:
    """`shared`, one item of every process at a time: no more answers than these are held."""
    world = place()[1]
    for begin in range(0, len(items), world):
        yield from shared(items[begin : begin + world], work)


def dealt(costs: Sequence[float]) -> list[int]:
    """For each item the process that takes it, so that none has much more to do than another: the dearest first, each
    to the one with least."""
    load = [0.0] * place()[1]
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = load.index(min(load))
        load[owners[i]] += costs[i]
    return owners


def collected(mine: dict[int, Answer], owners: Sequence[int]) -> list[Answer]:
    """All answers on all processes, in order.

    Args:
        mine: those of this process, by number.
        owners: by number, the process that has it.
    """
    rank, world = place()
    if world == 1:
        return [mine[i] for i in range(len(owners))]
    from torch import distributed

    found: list[Answer] = []
    for i, owner in enumerate(owners):
        carried: list[Any] = [mine[i] if owner == rank else None]
        distributed.broadcast_object_list(carried, src=owner)
        found.append(mine[i] if owner == rank else carried[0])
    return found


def everyones(own: Answer) -> list[Answer]:
    """What every process has, in their order; waits for all of them."""
    world = place()[1]
    if world == 1:
        return [own]
    from torch import distributed

    found: list[Any] = [None] * world
    distributed.all_gather_object(found, own)
    return found
