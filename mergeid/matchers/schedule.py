"""Which trees of spaces may be assigned at the same time, and how that is done.

Coordinate descent visits one tree of spaces after the other. What a tree scores depends on the trees that share a
tensor with it alone, so trees that do not may be solved side by side without changing the result: a pass becomes a row
of waves. Products are made in the calling thread (their own threads are those of the linear algebra library);
assignments run in a pool of threads, as SciPy's solver gives up the interpreter's lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from mergeid.basics import processes
from mergeid.neuron_graph.neuron_graph import Space

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
Solved = TypeVar("Solved")


def neighbours(trees: Sequence[Sequence[Space]]) -> list[set[int]]:
    """Per tree the trees that see it move: those on another axis of one of its tensors. A tree that is its own
    neighbour (a residual block without inner width) is not granted to gain by an assignment."""
    on: dict[str, set[tuple[int, int]]] = {}
    for k, tree in enumerate(trees):
        for axis in (a for s in tree for a in s.axes):
            on.setdefault(axis.tensor, set()).add((k, axis.axis))
    beside: list[set[int]] = [set() for _ in trees]
    for places in on.values():
        for k, d in places:
            beside[k] |= {other for other, e in places if e != d}
    return beside


def sharing(trees: Sequence[Sequence[Space]]) -> list[set[int]]:
    """Per tree the others that hold one of its spaces (one that lies in spaces of both)."""
    holders: dict[str, set[int]] = {}
    for k, tree in enumerate(trees):
        for s in tree:
            holders.setdefault(s.id, set()).add(k)
    return [{j for s in tree for j in holders[s.id]} - {k} for k, tree in enumerate(trees)]


def waves(order: Iterable[int], apart: Sequence[set[int]]) -> list[list[int]]:
    """The order as waves: no two of one wave are in each other's `apart`, and of any two that are, the earlier in the
    order comes in an earlier wave."""
    level: dict[int, int] = {}
    found: list[list[int]] = []
    for k in order:
        level[k] = 1 + max((level[j] for j in apart[k] if j in level and j != k), default=-1)
        if level[k] == len(found):
            found.append([])
        found[level[k]].append(k)
    return found


def shared_out(
    items: Sequence[int],
    owners: Sequence[int],
    prepare: Callable[[int], Prepared],
    solve: Callable[[int, Prepared], Solved],
    workers: int | None = None,
) -> list[tuple[int, Solved]]:
    """`in_threads`, each item in the process that owns it; all processes get all answers."""
    here = processes.place()[0]
    solved = dict(in_threads([k for k in items if owners[k] == here], prepare, solve, workers))
    mine = {i: solved[k] for i, k in enumerate(items) if k in solved}
    return list(zip(items, processes.collected(mine, [owners[k] for k in items]), strict=True))


def owners_of(planned: Sequence[Sequence[int]], trees: Sequence[Sequence[Space]]) -> list[int]:
    """By number of a tree, the process that assigns it: those of one wave are dealt out among all."""
    found = [0] * len(trees)
    for wave in planned:
        costs = [sum(s.size**2 * len(s.axes) for s in trees[k]) for k in wave]
        for k, owner in zip(wave, processes.dealt(costs), strict=True):
            found[k] = owner
    return found


def in_threads(
    items: Iterable[Item],
    prepare: Callable[[Item], Prepared],
    solve: Callable[[Item, Prepared], Solved],
    workers: int | None = None,
) -> Iterator[tuple[Item, Solved]]:
    """Each item with ``solve(item, prepare(item))``, in order.

    Args:
        prepare: called in this thread, item by item.
        solve: called in a pool of threads.
        workers: how many; default: torch's number of threads. At most one prepared item more than these is held.
    """
    count = torch.get_num_threads() if workers is None else workers
    if count <= 1:
        for item in items:
            yield item, solve(item, prepare(item))
        return
    with ThreadPoolExecutor(count) as pool:
        running: deque[tuple[Item, Future[Solved]]] = deque()
        for item in items:
            running.append((item, pool.submit(solve, item, prepare(item))))
            if len(running) > count:
                first, future = running.popleft()
                yield first, future.result()
        for first, future in running:
            yield first, future.result()
