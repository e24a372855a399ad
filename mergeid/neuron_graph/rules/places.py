"""Places among neurons as numbers (of the largest, of the first k, in order): what may be done with them.

They are other numbers where the neurons are in another order. To look up by them, or to write where they say, is to
meet these neurons, whatever their order. Who reads the numbers in any other way fixes the neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mergeid.neuron_graph.call import Places
from mergeid.neuron_graph.combine import combine, reduce
from mergeid.neuron_graph.layout import LABELLED, Fine, Group, Layout, merged_dim

if TYPE_CHECKING:
    from mergeid.neuron_graph.call import Call
    from mergeid.neuron_graph.facts import Labels

_MOVES = frozenset({
    "view", "reshape", "_unsafe_view", "_reshape_alias", "flatten", "unflatten", "permute", "transpose", "t", "squeeze",
    "unsqueeze", "expand", "repeat", "select", "slice", "narrow", "unbind", "split", "split_with_sizes", "chunk",
    "alias", "detach", "clone", "contiguous", "lift_fresh", "gather", "index_select", "index",
})  # fmt: skip
"""Take numbers from one tensor, their first, to others as they are."""
_LOOKS_UP = {
    "gather": "index",
    "scatter": "index",
    "scatter_add": "index",
    "scatter_reduce": "index",
    "index": "indices",
    "_unsafe_index": "indices",
    "index_put": "indices",
    "_unsafe_index_put": "indices",
    "_index_put_impl": "indices",
    "index_select": "index",
    "embedding": "indices",
    "_embedding_bag": "indices",
    "_embedding_bag_forward_only": "indices",
}
"""Op -> the argument that says where."""


def places_of(call: Call, layout: Layout, dims: Sequence[int]) -> Places:
    """Places along dimensions of a layout."""
    fix = partial(call.freeze_dims, layout, dims)
    if len(dims) == 1 and any(f.kind == LABELLED for f in layout.dims[dims[0] % len(layout.dims)]):
        layout = merged_dim(call.facts, layout, dims[0] % len(layout.dims), call.why)
        group = layout.group_of(layout.dims[dims[0] % len(layout.dims)][0])
        if len(group.fines) == 1:
            return Places(group.labels, fix)
    return Places(None, fix)


def places_through(call: Call) -> Places | None:
    """Fixes the neurons whose places a call reads as numbers. Returns what its outputs hold where it moves places from
    one tensor to another (None: it does not)."""
    tensors = call.tensors()
    if not any(call.recorder.places(t) for t in tensors):
        return None
    name = call.name.removesuffix("_").removeprefix("aten.")
    others = [t for k, v in call.bound.items() if k != _LOOKS_UP.get(name) for t in tree_leaves(v)]
    held = call.recorder.places(tensors[0])
    if held is not None and name == "aminmax":
        # whether they are in range: `one_hot` asks
        held = replace(held, labels=None, bounds=True)
    elif held is not None and held.bounds and name == "_local_scalar_dense":
        return None
    elif held is not None and not _moves(call, name, held):
        held = None
    call.recorder.use(t for t in others if isinstance(t, Tensor) and not (held is not None and t is tensors[0]))
    return held


def _moves(call: Call, name: str, held: Places) -> bool:
    if name == "remainder":  # of their own number: what is below it stays
        return held.labels is not None and call.get("other") == len(held.labels)
    if name in ("_to_copy", "to"):
        return call.get("dtype") in (None, torch.int32, torch.int64)
    return name.removesuffix("_copy") in _MOVES


def fitting(call: Call, index: Tensor, size: int) -> Labels | None:
    """The neurons whose places `index` holds, where these are those of a dimension of that size; else None, and the
    neurons are fixed."""
    places = call.recorder.places(index)
    if places is None or (places.labels is not None and len(places.labels) == size):
        return None if places is None else places.labels
    call.recorder.use([index])
    return None


def met(call: Call, layout: Layout, dim: int, labels: Labels) -> Layout:
    """The layout where the neurons of a dimension are these."""
    fine = Fine(len(labels), LABELLED)
    own = Layout(((fine,),), (Group(labels, (fine,)),))
    letters = range(len(layout.dims))
    return combine(call.facts, [(layout, letters), (own, [dim])], letters, call.why)


def looked_up(call: Call, layout: Layout, dim: int, index: Tensor) -> Layout:
    """The layout after a look-up along a dimension, which has one position left: what the index says are places among
    neurons, or positions are fixed."""
    labels = fitting(call, index, layout.shape[dim]) if layout.shape[dim] > 1 else None
    layout = call.freeze_dims(layout, [dim]) if labels is None else met(call, layout, dim, labels)
    return reduce(call.facts, layout, [dim], True, call.why)
