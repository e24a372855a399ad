"""Which tensors stand in an order that the weights chose.

A router sends tokens to experts and sorts them by expert. Two models that choose otherwise for one token have different
tokens in all rows that follow, so that their neurons cannot be compared there row by row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from mergeid.neuron_graph.layout import LABELLED

if TYPE_CHECKING:
    from mergeid.neuron_graph.call import Call

_TAKE = ("index", "index_select", "gather", "masked_select")
_PUT = ("index_add", "index_put", "index_copy", "index_reduce", "scatter", "scatter_add", "scatter_reduce")


class Routes:
    """Follows the calls of one pass."""

    def __init__(self) -> None:
        # what a tensor depends on
        self._weights: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._inputs: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._routed: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def weight(self, tensor: Tensor) -> None:
        """A tensor of the model."""
        self._weights[tensor] = True

    def input(self, tensor: Tensor) -> None:
        """A tensor of the batch."""
        self._inputs[tensor] = True

    def routed(self, tensor: Tensor) -> bool:
        """Whether its rows stand in an order that the weights chose for these inputs."""
        return tensor in self._routed

    def follow(self, call: Call) -> None:
        """What a call's outputs have of its inputs."""
        inputs = call.tensors()
        marks = [kind for kind in (self._weights, self._inputs) if any(t in kind for t in inputs)]
        if self._is_routed(call, inputs):
            marks.append(self._routed)
        for tensor in (x for out in call.outputs() for x in (out, call.recorder.root(out))):
            for kind in marks:
                kind[tensor] = True

    def _is_routed(self, call: Call, inputs: list[Tensor]) -> bool:
        name = call.name.removeprefix("aten.").removeprefix("_unsafe_").removesuffix("_")
        if name in _PUT:  # back to where it was taken from
            return call["self"] in self._routed
        routed = any(t in self._routed for t in inputs)
        if name not in _TAKE or not _moves_vectors(call, call["self"]):
            return routed
        places = tree_leaves([call.get(k) for k in ("indices", "index", "mask")])
        chosen = any(t in self._weights and t in self._inputs for t in places if isinstance(t, Tensor))
        return routed != chosen  # who takes from what was taken puts it back


def _moves_vectors(call: Call, tensor: Tensor) -> bool:
    """Whether places are chosen among positions, each with neurons of its own; a score among scores is not."""
    layout = call.layout_of(tensor)
    if not layout.data:
        return False
    at = {call["dim"] % max(tensor.dim(), 1)} if "dim" in call.bound else _indexed(call)
    return any(f.kind == LABELLED for d, fines in enumerate(layout.dims) if d not in at for f in fines)


def _indexed(call: Call) -> set[int]:
    at, found = 0, set()
    for x in call.bound.get("indices") or ():
        wide = x.dim() if isinstance(x, Tensor) and str(x.dtype) in ("torch.bool", "torch.uint8") else 1
        if x is not None:
            found |= set(range(at, at + wide))
        at += wide
    return found
