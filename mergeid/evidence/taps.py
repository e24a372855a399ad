"""Where the activations of a space are read."""

from __future__ import annotations

import numpy as np
from torch import nn

from mergeid.neuron_graph.neuron_graph import NeuronGraph, TapMap

Key = tuple[str, str, int]
"""Module, "in" or "out", call."""


def choose_taps(graph: NeuronGraph, model: nn.Module, most: int = 3) -> dict[str, list[TapMap]]:
    """Where to read each space: the inputs of the layers that consume it, else outputs; at most `most` of them,
    evenly over the depth. Where possible not where another space is what positions are: clusters, learned queries."""
    chosen: dict[str, list[TapMap]] = {}
    crossed = _crossed(graph)
    for space, all_taps in graph.taps.items():
        size = graph.by_id[space].size
        usable = [k for k, t in enumerate(all_taps) if 0 not in t.dims]  # where examples are
        taps = [all_taps[k] for k in usable if (space, k) not in crossed]
        taps = taps if any(_is_whole(t, size) for t in taps) else [all_taps[k] for k in usable]
        consumed = [t for t in taps if t.kind == "in" and _has_matrix(model.get_submodule(t.module))]
        found = consumed or [t for t in taps if t.kind == "out"] or taps
        whole = [t for t in found if _is_whole(t, size)] or found
        keep = np.unique(np.linspace(0, len(whole) - 1, min(most, len(whole))).round().astype(int))
        if len(whole):
            chosen[space] = [whole[i] for i in keep]
    return chosen


def _crossed(graph: NeuronGraph) -> set[tuple[str, int]]:
    """(space, tap number) where another space lies on other dimensions of the same tensor: B has it in another order,
    and A's first position is not B's."""
    at: dict[Key, list[tuple[str, int, set[int]]]] = {}
    for space, taps in graph.taps.items():
        for k, t in enumerate(taps):
            at.setdefault((t.module, t.kind, t.call), []).append((space, k, set(t.dims)))
    return {
        (space, k)
        for found in at.values()
        for space, k, dims in found
        if any(other != space and dims.isdisjoint(there) for other, _, there in found)
    }


def _is_whole(tap: TapMap, size: int) -> bool:
    return len(np.unique(tap.index[tap.index >= 0])) == size


def _has_matrix(module: nn.Module) -> bool:
    return any(p.dim() >= 2 for p in module.parameters(recurse=False))
