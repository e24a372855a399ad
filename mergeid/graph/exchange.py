"""The exchange format ``mergeid.graph/1``: a neuron graph as JSON, for other tools and for corrections by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mergeid.errors import MergeidError
from mergeid.graph.group import NoImage, random_permutations
from mergeid.graph.neuron_graph import AxisMap, NeuronGraph, Space, TapMap

FORMAT = "mergeid.graph/1"


def to_json(graph: NeuronGraph) -> dict[str, Any]:
    """The graph in the exchange format ``mergeid.graph/1`` (see README)."""
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


def from_json(data: Mapping[str, Any] | str) -> NeuronGraph:
    """Read the exchange format; a graph written or corrected by hand may leave out everything but format, tensors and
    spaces, and of a space everything but id, size and axes (blocks: one).

    Raises `MergeidError` for anything that is not a valid graph."""
    if isinstance(data, str):
        try:
            data = json.loads(data)
        except json.JSONDecodeError as e:
            raise MergeidError(f"the graph is not JSON ({e}); expected the format {FORMAT}") from None
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
        raise MergeidError(f"the graph has format {found!r}; expected {FORMAT!r}")
    try:
        graph = _parsed(data)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
        raise MergeidError(f"the graph is not a valid {FORMAT}: {type(e).__name__} {e}") from None
    _validate(graph)
    return graph


def _parsed(data: Mapping[str, Any]) -> NeuronGraph:
    tensors = {t: tuple(int(n) for n in v["shape"]) for t, v in data["tensors"].items()}
    spaces, taps = [], {}
    for s in data["spaces"]:
        blocks, size = int(s.get("blocks", 1)), int(s["size"])
        if blocks < 1 or size < 1 or size % blocks:
            raise ValueError(f"space {s['id']!r} has {size} neurons in {blocks} blocks of equal size")
        members, parents = size // blocks, tuple(s.get("parents", ()))
        where = s.get("block_parents")
        if where is None:
            if len(parents) > 1:
                raise ValueError(f"space {s['id']!r} has several parents and needs block_parents")
            where = [[b] for b in range(blocks)] if parents else [[] for _ in range(blocks)]
        axes = tuple(AxisMap(a["tensor"], int(a["axis"]), _flat(a["index"], members)) for a in s["axes"])
        spaces.append(
            Space(
                s["id"],
                s.get("label", s["id"]),
                size,
                blocks,
                parents,
                np.array(where, np.int64).reshape(blocks, len(parents)),
                axes,
            )
        )
        taps[s["id"]] = [
            TapMap(t["module"], t["kind"], t["call"], t["ndim"], tuple(t["dims"]), _flat(t["index"], members))
            for t in s.get("taps", [])
        ]
    frozen = [(f["tensor"], int(f["axis"]), f["why"]) for f in data.get("frozen", [])]
    return NeuronGraph(
        data.get("model", ""),
        tensors,
        spaces,
        frozen,
        taps,
        dict(data.get("versions", {})),
        data.get("verified"),
        dict(data.get("unknown_ops", {})),
    )


def _validate(graph: NeuronGraph) -> None:
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
                    f"space {s.id!r} has {s.blocks} blocks, not all of which lie in one of the {seen[p].size} neurons "
                    f"of its parent {p!r}; give its block_parents"
                )
        seen[s.id] = s
        for a in s.axes:
            _validate_axis(graph, s, a, taken)
    _validate_group(graph)


def _validate_axis(graph: NeuronGraph, s: Space, a: AxisMap, taken: dict[tuple[str, int], np.ndarray]) -> None:
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


def _validate_group(graph: NeuronGraph) -> None:
    """Blocks can follow their parents, and no neuron leaves an axis: tried on two random elements."""
    draw = np.random.default_rng(0).permutation
    for _ in range(2):
        try:
            element = random_permutations(graph.structures, draw)
        except NoImage as error:
            s = graph.spaces[error.cell]
            raise MergeidError(
                f"the blocks of space {s.id!r} cannot follow its parents {', '.join(s.parents)}: where one of these "
                "moves, no block lies where the moved one would have to go"
            ) from None
        for s, perm in zip(graph.spaces, element, strict=True):
            for a in s.axes:
                if not np.array_equal(np.sort(perm[a.members]), a.members):
                    raise MergeidError(
                        f"only some neurons of a block of space {s.id!r} lie on axis {a.axis} of {a.tensor!r}; "
                        "expected all that may trade places, or none"
                    )


def _pairs(index: np.ndarray, members: int) -> list[list[int] | None]:
    return [None if i < 0 else [i // members, i % members] for i in index.tolist()]


def _flat(pairs: Sequence[Sequence[int] | None], members: int) -> np.ndarray:
    return np.array([-1 if p is None else p[0] * members + p[1] for p in pairs], np.int64)
