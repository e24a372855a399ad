"""On which side of its layer an axis lies: its outputs or its inputs.

Permutations act on both alike. Soft maps, merges of features and scalings do not: what averages on one side copies on
the other.
"""

from __future__ import annotations

from typing import Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from mergeid.errors import MergeidError
from mergeid.neuron_graph.neuron_graph import NeuronGraph, Space

Side = Literal["out", "in"]


def side(graph: NeuronGraph, model: nn.Module, tensor: str, axis: int) -> Side:
    """The side of one axis.

    Vectors, and kernels that act channel by channel, belong to the outputs. Linear and convolutional layers and
    embeddings are known by their type; any other layer by where the activations of its spaces are read.

    Raises `MergeidError` where neither tells.
    """
    module = model.get_submodule(tensor.rpartition(".")[0])
    shape = graph.tensors[tensor]
    if len(shape) == 1:
        return "out"
    if isinstance(module, _ConvTransposeNd):
        return "out" if axis == 1 else "in"
    if isinstance(module, (nn.Linear, _ConvNd)):
        return "out" if axis == 0 else "in"
    if isinstance(module, nn.Embedding):
        return "out" if axis == 1 else "in"
    name = tensor.rpartition(".")[0]
    for space, found in graph.on_tensor.get(tensor, []):
        if found.axis == axis:
            kinds = {t.kind for t in graph.taps.get(space.id, []) if t.module == name and 0 not in t.dims}
            if kinds in ({"in"}, {"out"}):
                return "in" if kinds == {"in"} else "out"
    raise MergeidError(
        f"axis {axis} of {tensor!r} in a {type(module).__name__} is neither known as output nor as input; only "
        "permutations can be applied there"
    )


def sides(graph: NeuronGraph, model: nn.Module, space: Space) -> list[Side]:
    """The side of every axis of a space, in their order."""
    return [side(graph, model, a.tensor, a.axis) for a in space.axes]
