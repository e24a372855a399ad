"""The exchange format ``mergeid.graph/1``: a neuron graph as JSON, for other tools and for corrections by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mergeid.basics.reading import parse_json
from mergeid.errors import MergeidError, shown
from mergeid.neuron_graph.group import NoImage, Structure, random_permutations
from mergeid.neuron_graph.space import AxisMap, Space, TapMap

if TYPE_CHECKING:
    from mergeid.io.schema import GraphFile, SpaceEntry

FORMAT = "mergeid.graph/1"
UNSPOKEN = 1 << 20
"""Most neurons of a space beyond the positions that the graph itself lists."""


@dataclass
class Parts:
    """What a graph is made of, as `mergeid.NeuronGraph` takes it."""

    model: str
    tensors: dict[str, tuple[int, ...]]
    spaces: list[Space]
    frozen: list[tuple[str, int, str]] = field(default_factory=list)
    taps: dict[str, list[TapMap]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    verified: dict[str, Any] | None = None
    unknown_ops: dict[str, str] = field(default_factory=dict)


class Group(Protocol):
    """What of a graph acts on tensors."""

    tensors: dict[str, tuple[int, ...]]
    spaces: list[Space]

    @property
    def structures(self) -> list[Structure]:
        """Blocks and parents of each space."""
        ...


class Whole(Group, Protocol):
    """All of a graph that is written."""

    model: str
    frozen: list[tuple[str, int, str]]
    taps: dict[str, list[TapMap]]
    versions: dict[str, str]
    verified: dict[str, Any] | None
    unknown_ops: dict[str, str]

    @property
    def share(self) -> float:
        """Parameters on a free axis / all parameters."""
        ...


def written(graph: Whole) -> dict[str, Any]:
    """The graph in the exchange format ``mergeid.graph/1`` (see docs/pages/files.md)."""
    return {
        "format": FORMAT,
        "model": graph.model,
        "versions": graph.versions,
        "tensors": {t: {"shape": list(s)} for t, s in graph.tensors.items()},
        "spaces": [
            {
                "id": s.id,
                "label": s.label,
                "size": s.size,
                "blocks": s.blocks,
                "parents": list(s.parents),
                "block_parents": s.block_parents.tolist(),
                "axes": [{"tensor": a.tensor, "axis": a.axis, "index": _pairs(a.index, s.members)} for a in s.axes],
                "taps": [
                    {
                        "module": t.module,
                        "kind": t.kind,
                        "call": t.call,
                        "ndim": t.ndim,
                        "dims": list(t.dims),
                        "index": _pairs(t.index, s.members),
                    }
                    for t in graph.taps.get(s.id, [])
                ],
            }
            for s in graph.spaces
        ],
        "share": graph.share,
        "frozen": [{"tensor": t, "axis": a, "why": why} for t, a, why in graph.frozen],
        "unknown_ops": graph.unknown_ops,
        "verified": graph.verified,
    }


def parsed(data: Mapping[str, Any] | str) -> Parts:
    """What a graph in the exchange format says. Raises `MergeidError` for anything else; see also `check_graph`."""
    if isinstance(data, str):
        data = parse_json(data, "the graph", f"the format {FORMAT}", own=True)
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, Mapping) else data
        raise MergeidError(f"the graph has format {shown(found)}; expected {FORMAT!r}")
    from mergeid.io.schema import GraphFile, validated

    return _parts(validated(GraphFile, data, "the graph"))


def space_of(entry: SpaceEntry) -> Space:
    """A space as a file has it. Raises `MergeidError` for blocks and parents that do not fit together."""
    size, blocks, name = entry.size, entry.blocks, shown(entry.id)
    if size % blocks:
        raise MergeidError(f"space {name} has {size} neurons in {blocks} blocks; expected blocks of equal size")
    where = entry.block_parents
    if where is None and len(entry.parents) > 1:
        raise MergeidError(f"space {name} has several parents and needs block_parents")
    if where is None:
        where = [[b] for b in range(blocks)] if entry.parents else [[]] * blocks
    if len(where) != blocks or any(len(row) != len(entry.parents) for row in where):
        raise MergeidError(
            f"space {name} has {blocks} blocks and {len(entry.parents)} parents; expected one row of block_parents for "
            "each block, with one neuron of each parent"
        )
    parents = np.array(where, np.int64).reshape(blocks, len(entry.parents))
    axes = tuple(AxisMap(a.tensor, a.axis, _flat(a.index, size // blocks, blocks, name)) for a in entry.axes)
    label = entry.id if entry.label is None else entry.label
    return Space(entry.id, label, size, blocks, tuple(entry.parents), parents, axes)


def _parts(data: GraphFile) -> Parts:
    spoken_of = sum(len(a.index) for s in data.spaces for a in s.axes)
    spoken_of += sum(len(row) for s in data.spaces for row in s.block_parents or ())
    for entry in data.spaces:
        if entry.size > max(spoken_of, UNSPOKEN):
            raise MergeidError(
                f"space {shown(entry.id)} has {entry.size:,} neurons, but all axes of the graph have {spoken_of:,} "
                "positions; expected the size of a layer"
            )
    taps = {
        s.id: [
            TapMap(t.module, t.kind, t.call, t.ndim, tuple(t.dims), _flat(t.index, s.size // s.blocks, s.blocks, s.id))
            for t in s.taps
        ]
        for s in data.spaces
    }
    return Parts(
        data.model,
        {t: tuple(v.shape) for t, v in data.tensors.items()},
        [space_of(s) for s in data.spaces],
        [(f.tensor, f.axis, f.why) for f in data.frozen],
        taps,
        dict(data.versions),
        data.verified,
        dict(data.unknown_ops),
    )


def check_graph(graph: Group) -> None:
    """Raises `MergeidError` where spaces, parents and axes do not make a group that acts on the tensors."""
    seen: dict[str, Space] = {}
    taken: dict[tuple[str, int], np.ndarray] = {}
    for s in graph.spaces:
        if s.id in seen:
            raise MergeidError(f"two spaces have the id {s.id!r}; expected a different one for each")
        late = [p for p in s.parents if p not in seen]
        if late:
            raise MergeidError(f"space {s.id!r} names the parent {late[0]!r}, which must come before it")
        for k, p in enumerate(s.parents):
            if s.block_parents[:, k].min() < 0 or s.block_parents[:, k].max() >= seen[p].size:
                raise MergeidError(
                    f"space {s.id!r} has {s.blocks} blocks, not all of which are inside one of the {seen[p].size} "
                    f"neurons "
                    f"of its parent {p!r}; give its block_parents"
                )
        seen[s.id] = s
        for a in s.axes:
            _validate_axis(graph, s, a, taken)
    _validate_group(graph)


def _validate_axis(graph: Group, s: Space, a: AxisMap, taken: dict[tuple[str, int], np.ndarray]) -> None:
    shape = graph.tensors.get(a.tensor)
    if shape is None or not 0 <= a.axis < len(shape) or len(a.index) != shape[a.axis]:
        raise MergeidError(
            f"space {s.id!r} names axis {a.axis} of tensor {a.tensor!r} with {len(a.index)} positions; "
            f"that tensor has shape {shape}"
        )
    held = a.index >= 0
    if a.index.max(initial=-1) >= s.size or a.index.min(initial=0) < -1:
        raise MergeidError(f"space {s.id!r} has {s.size} neurons, but {a.tensor!r} names more")
    counts = np.unique(np.unique(a.index[held], return_counts=True)[1])
    if len(counts) > 1:
        raise MergeidError(
            f"some neurons of space {s.id!r} lie on {counts[0]} and some on {counts[-1]} positions of axis {a.axis} of "
            f"{a.tensor!r}; expected equally many"
        )
    others = taken.setdefault((a.tensor, a.axis), np.zeros(len(held), bool))
    if (others & held).any():
        raise MergeidError(
            f"position {int(np.flatnonzero(others & held)[0])} of axis {a.axis} of {a.tensor!r} belongs to space "
            f"{s.id!r} and to another one; expected one space"
        )
    others |= held


def _validate_group(graph: Group) -> None:
    """Blocks can follow their parents, and no neuron leaves an axis: tried on two random elements."""
    draw = np.random.default_rng(0).permutation
    for _ in range(2):
        try:
            element = random_permutations(graph.structures, draw)
        except (ValueError, OverflowError, MemoryError):
            raise MergeidError("the parents of the graph's blocks have more combinations than can be counted") from None
        except NoImage as error:
            s = graph.spaces[error.cell]
            raise MergeidError(
                f"the blocks of space {s.id!r} cannot follow its parents {', '.join(s.parents)}: when one of these "
                f"is permuted, its blocks have nowhere to go"
            ) from None
        for s, perm in zip(graph.spaces, element, strict=True):
            for a in s.axes:
                if not np.array_equal(np.sort(perm[a.members]), a.members):
                    raise MergeidError(
                        f"only some neurons of a block of space {s.id!r} lie on axis {a.axis} of {a.tensor!r}; "
                        "expected all that can be permuted, or none"
                    )


def _pairs(index: np.ndarray, members: int) -> list[list[int] | None]:
    return [None if i < 0 else [i // members, i % members] for i in index.tolist()]


def _flat(pairs: Sequence[Sequence[int] | None], members: int, blocks: int, space: str) -> np.ndarray:
    for pair in pairs:
        if pair is not None and not (pair[0] < blocks and pair[1] < members):
            raise MergeidError(
                f"space {space} has {blocks} blocks of {members} neurons, but an index names more: {list(pair)}"
            )
    return np.array([-1 if p is None else p[0] * members + p[1] for p in pairs], np.int64)
