"""Layers of a kind of which the example inputs reach some and not others: experts that no token chose."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mergeid.errors import MergeidError, MergeidWarning
from mergeid.models.loaded import Loaded, ModuleAdapter
from mergeid.plugins import Batch

if TYPE_CHECKING:
    from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph

UNREAD = "never read"
"""How the trace begins to say why such an axis is frozen."""
SIZES = (8, 32, 128)
"""Examples that are tried in turn, where the usual few are not enough."""


def unread_notes(graph: NeuronGraph, element: Element) -> list[str]:
    """What is said of tensors that no example input reaches and that are as large along an axis as neurons that an
    element reorders: if another input reaches them and they read these, they read them in the old order."""
    still = graph.identity()
    moved = {s.size for s in graph.spaces if s.id in element and (element[s.id] != still[s.id]).any()}
    read = {t for t, axis, why in graph.frozen if not why.startswith(UNREAD)} | set(graph.on_tensor)
    unread = dict.fromkeys(t for t, axis, why in graph.frozen if why.startswith(UNREAD) and t not in read)
    left = [t for t in unread if moved & set(graph.tensors[t])]
    if not left:
        return []
    more = f" and {len(left) - 1} more tensors are" if len(left) > 1 else " is"
    return [
        f"{left[0]}{more} never read on the example inputs, while neurons that other inputs may read there move; give "
        "example inputs that reach all of the model"
    ]


def unreached(graph: NeuronGraph, loaded: Loaded) -> list[str]:
    """Tensors that no example input reaches, while others of their kind (the same name but for numbers, of the same
    shape) are read and move together with the rest of the network. Those of which no kind is read, such as a pooler
    that nobody uses, are not among them."""
    shapes = {k: tuple(t.shape) for k, t in loaded.state().items() if t.is_floating_point() and t.dim()}
    unread: dict[str, set[int]] = {}
    for tensor, axis, why in graph.frozen:
        if why.startswith(UNREAD):
            unread.setdefault(tensor, set()).add(axis)
    wholly = {t for t, axes in unread.items() if len(axes) == sum(n > 1 for n in shapes.get(t, ()))}
    kinds = {_kind(t, shapes[t]) for t in wholly}
    moving: set[tuple[str, tuple[int, ...]]] = set()
    for space in graph.spaces:
        on = {_kind(a.tensor, shapes[a.tensor]) for a in space.axes if a.tensor in shapes}
        if on - kinds:  # else a reordering of it stays among themselves
            moving |= on & kinds
    return [t for t in shapes if t in wholly and _kind(t, shapes[t]) in moving]


def _kind(tensor: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    return re.sub(r"\d+", "#", tensor), shape


def wider_examples(loaded: Loaded, seed: int) -> Iterator[Batch]:
    """Larger batches of the adapter's own example inputs; none for a live module that only its user can feed."""
    import torch

    from mergeid.data.batches import input_dtype, to_model

    if isinstance(loaded.adapter, ModuleAdapter):
        return
    place = next((p.device for p in loaded.model.parameters()), torch.device("cpu"))
    for i, size in enumerate(SIZES):
        generator = torch.Generator().manual_seed(seed + i + 1)
        try:
            batch = loaded.adapter.example_inputs(loaded.arch, loaded.model, generator, size)
        except (MergeidError, TypeError):  # an adapter whose examples are of one size
            return
        yield to_model(loaded.inputs_of(batch), place, input_dtype(loaded.model))


def warn_of(left: list[str], loaded: Loaded) -> None:
    """Say which layers stay as they are while what they are connected to may be put into another order."""
    kinds = sorted({t.rpartition(".")[0] for t in left})
    more = f" and {len(kinds) - 1} more" if len(kinds) > 1 else ""
    cure = (
        "give example_inputs that reach them all"
        if isinstance(loaded.adapter, ModuleAdapter)
        else "merge with --match never, or load the model and give example_inputs that reach them all"
    )
    warnings.warn(
        f"the example inputs of {loaded.source} never reach {kinds[0]}{more}, though they reach others of their kind "
        "(experts that no input chose?); their neurons stay in place, and wherever they run, a model whose other "
        f"neurons were reordered computes something else: {cure}",
        MergeidWarning,
        stacklevel=5,
    )
