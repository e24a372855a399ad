"""Which tensors write a space: whose rows are its neurons, and what they read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from torch import nn

from mergeid.neuron_graph.neuron_graph import AxisMap, NeuronGraph, TapMap
from mergeid.nn.layers import bare_tables, is_table, neuron_axes
from mergeid.nn.names import FIXED, MASK


@dataclass(frozen=True)
class Writer:
    """A tensor with neurons of a space along one of its axes.

    Attributes:
        reads: spaces on its other axes. unknown: why what it reads is not known to be a network input or a space, or
            whether it writes the space at all; such a writer anchors nothing.
    """

    tensor: str
    axis: AxisMap
    reads: frozenset[str]
    unknown: str | None


def writers_of(graph: NeuronGraph, model: nn.Module, entries: Collection[str]) -> dict[str, list[Writer]]:
    """Space id -> its writers, for every space (none: an empty list).

    Args:
        entries: modules that read inputs of the network as they come (`mergeid.evidence.entries`). What lies on no
            space is frozen, and may be an input, or neurons whose order only the two trainings know.
    """
    out: dict[str, list[Writer]] = {s.id: [] for s in graph.spaces}
    for space in graph.spaces:
        for axis in space.axes:
            if not _is_weight(graph, axis.tensor):
                continue
            module, name = _owner(model, axis.tensor)
            if module is None:
                continue
            along = {**neuron_axes(module), **bare_tables(module)}.get(name)
            if along is None:
                if len(axis.index) == prod(graph.tensors[axis.tensor]):
                    continue  # a gain in the shape of what it multiplies
                why: str | None = f"whether {axis.tensor} writes its neurons or reads them is not known"
            elif along != axis.axis:
                continue
            else:
                why = None if is_table(module, name) else _unknown_inputs(graph, axis, entries)
            reads = {s.id for s, x in graph.on_tensor[axis.tensor] if x.axis != axis.axis}
            if along is not None and getattr(module, "groups", 1) > 1:
                # the inputs of a grouped convolution do not all lie on an axis of its weight
                before = {i for i, taps in graph.taps.items() if _enters(taps, axis.tensor)}
                why = why or (None if before else f"the inputs of {axis.tensor} are not known")
                reads |= before
            out[space.id].append(Writer(axis.tensor, axis, frozenset(reads), why))
    return out


def _is_weight(graph: NeuronGraph, tensor: str) -> bool:
    """A tensor of two dimensions or more that is no stored part of another one: vectors (biases, gains, statistics)
    have one value per neuron, and no fixed part."""
    stem = tensor.removesuffix(FIXED).removesuffix(MASK)
    return len(graph.tensors[tensor]) > 1 and (stem == tensor or stem not in graph.tensors)


def _owner(model: nn.Module, tensor: str) -> tuple[nn.Module | None, str]:
    owner, _, name = tensor.rpartition(".")
    try:
        return model.get_submodule(owner), name
    except AttributeError:
        return None, name


def _enters(taps: Sequence[TapMap], tensor: str) -> bool:
    owner = tensor.rpartition(".")[0]
    return any(t.module == owner and t.kind == "in" and 0 not in t.dims for t in taps)


def _covered(graph: NeuronGraph, tensor: str, axis: int) -> np.ndarray:
    """Which positions of an axis lie on a space."""
    held = np.zeros(graph.tensors[tensor][axis], bool)
    for _, x in graph.on_tensor.get(tensor, []):
        if x.axis == axis:
            held |= x.index >= 0
    return held


def _unknown_inputs(graph: NeuronGraph, axis: AxisMap, entries: Collection[str]) -> str | None:
    owner = axis.tensor.rpartition(".")[0]
    shape = graph.tensors[axis.tensor]
    # what the layer sums over; further axes are places, as in a convolution's kernel
    read = 1 if axis.axis == 0 else 0
    if shape[read] > 1 and owner not in entries and not _covered(graph, axis.tensor, read).all():
        return f"{axis.tensor} reads frozen neurons, and whether they correspond is not known"
    return None
