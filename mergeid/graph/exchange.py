"""The exchange format ``mergeid.graph/1``: a neuron graph as JSON, for other tools and for corrections by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mergeid.errors import MergeidError
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
    """Read the exchange format; a graph written or corrected by hand may leave out everything but format,
    tensors and spaces. Raises `MergeidError` for anything that is not a valid graph."""
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
    except (KeyError, TypeError, ValueError) as e:
        raise MergeidError(f"the graph is not a valid {FORMAT}: {type(e).__name__} {e}") from None
    _validate(graph)
    return graph


def _parsed(data: Mapping[str, Any]) -> NeuronGraph:
    tensors = {t: tuple(int(n) for n in v["shape"]) for t, v in data["tensors"].items()}
    spaces, taps = [], {}
    for s in data["spaces"]:
        blocks, size = int(s["blocks"]), int(s["size"])
        members, parents = size // blocks, tuple(s["parents"])
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
    seen: set[str] = set()
    for s in graph.spaces:
        late = [p for p in s.parents if p not in seen]
        if late:
            raise MergeidError(f"space {s.id!r} names the parent {late[0]!r}, which must come before it")
        seen.add(s.id)
        for a in s.axes:
            shape = graph.tensors.get(a.tensor)
            if shape is None or a.axis >= len(shape) or len(a.index) != shape[a.axis]:
                raise MergeidError(
                    f"space {s.id!r} names axis {a.axis} of tensor {a.tensor!r} with {len(a.index)} positions; "
                    f"that tensor has shape {shape}"
                )
            if a.index.max(initial=-1) >= s.size:
                raise MergeidError(f"space {s.id!r} has {s.size} neurons, but {a.tensor!r} names more")


def _pairs(index: np.ndarray, members: int) -> list[list[int] | None]:
    return [None if i < 0 else [i // members, i % members] for i in index.tolist()]


def _flat(pairs: Sequence[Sequence[int] | None], members: int) -> np.ndarray:
    return np.array([-1 if p is None else p[0] * members + p[1] for p in pairs], np.int64)
