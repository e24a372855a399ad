"""The network as it is drawn: blocks in order, with the spaces that lie in each, and those that run past many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergeid.evidence.decide import SpaceEvidence
    from mergeid.results.plan import Plan

MOST_ROWS = 96
"""Blocks that are drawn at most; beyond that, outer blocks are drawn in place of inner ones."""
SHORT = 2
"""Blocks that a space may touch and still be drawn inside the first of them."""
STEM = 6
"""Numbered layers of one container that are drawn as one block."""


@dataclass(frozen=True)
class Drawn:
    """A space in its place.

    Attributes:
        first, last: the rows that it touches. lane: its place beside the rows; -1 for a space inside a row.
    """

    space: SpaceEvidence
    first: int
    last: int
    lane: int = -1


@dataclass(frozen=True)
class Row:
    """A block of the network, by the common beginning of its tensors' names."""

    name: str
    spaces: tuple[Drawn, ...]


@dataclass(frozen=True)
class Network:
    """Attributes:
    rows: blocks in order. streams: spaces that run past more than `SHORT` blocks. lanes: how many fit beside.
    """

    rows: tuple[Row, ...]
    streams: tuple[Drawn, ...]
    lanes: int


def draw(plan: Plan) -> Network:
    """Where each space of the plan is drawn; blocks that no space begins or ends in are left out."""
    names = rows_of(list(plan.graph.tensors))
    order = {name: i for i, name in enumerate(dict.fromkeys(names.values()))}
    touched = {s.id: sorted({order[names[a.tensor]] for a in s.axes if a.tensor in names}) for s in plan.graph.spaces}
    placed = [(record, at) for record in plan.spaces if (at := touched.get(record.id) or _of_parents(record, touched))]
    kept = sorted({i for _, at in placed for i in ((at[0], at[-1]) if len(at) > SHORT else at[:1])})
    row = {old: new for new, old in enumerate(kept)}
    inside: dict[int, list[Drawn]] = {new: [] for new in row.values()}
    streams: list[Drawn] = []
    ends: list[int] = []
    for record, at in placed:
        if len(at) <= SHORT:
            inside[row[at[0]]].append(Drawn(record, row[at[0]], row[at[0]]))
            continue
        lane = next((k for k, end in enumerate(ends) if end < at[0]), len(ends))
        ends[lane:] = [at[-1], *ends[lane + 1 :]]
        streams.append(Drawn(record, row[at[0]], row[at[-1]], lane))
    rows = tuple(Row(name, tuple(inside[row[i]])) for name, i in order.items() if i in row)
    return Network(rows, tuple(streams), len(ends))


def _of_parents(record: SpaceEvidence, touched: dict[str, list[int]]) -> list[int]:
    """A space that holds no axis of its own (attention heads) lies where the spaces inside it, or around it, do."""
    return next((touched[p] for p in record.parents if touched.get(p)), [0])


def rows_of(tensors: Sequence[str]) -> dict[str, str]:
    """Tensor name -> block: up to the last number in the name where that makes few enough blocks, else the number
    before it, and so on; the first parts of the name where it has no number. The few numbered layers of a small
    container (a stem) make one block."""
    depth = max((sum(p.isdigit() for p in name.split(".")) for name in tensors), default=0)
    while True:
        found = _joined({name: _cut(name, depth) for name in tensors})
        if depth <= 1 or len(set(found.values())) <= MOST_ROWS:
            return found
        depth -= 1


def _joined(found: dict[str, str]) -> dict[str, str]:
    layers: dict[str, set[str]] = {}
    for name, block in found.items():
        container, _, last = block.rpartition(".")
        if container and last.isdigit():
            layers.setdefault(container, set()).add(name.removeprefix(block))
    small = {c for c, rest in layers.items() if all(r.count(".") == 1 for r in rest)}
    counts = {c: len({b for b in found.values() if b.rpartition(".")[0] == c}) for c in small}
    small = {c for c in small if counts[c] <= STEM}
    return {n: _outer(c) if (c := b.rpartition(".")[0]) in small else b for n, b in found.items()}


def _outer(container: str) -> str:
    """The numbered block that a small container lies in, else the container itself."""
    parts = container.split(".")
    places = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: places[-1] + 1]) if places else container


def _cut(name: str, numbers: int) -> str:
    parts = name.split(".")
    places = [i for i, part in enumerate(parts[:-1]) if part.isdigit()][:numbers]
    if places:
        return ".".join(parts[: places[-1] + 1])
    return ".".join(parts[:-1][: max(1, len(parts) - 2)]) or parts[0]
