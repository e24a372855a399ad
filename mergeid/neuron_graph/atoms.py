"""The labels that a graph is about: one for every index of every axis of every tensor."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from torch import Tensor

from mergeid.basics.aliases import address_of, axes_in_memory, overlapping, place_of, view_of
from mergeid.basics.casting import holds_numbers
from mergeid.neuron_graph.facts import Facts, Labels


def atoms(facts: Facts, state: Mapping[str, Tensor]) -> dict[str, tuple[Labels, ...]]:
    """Tensor name -> the labels of each of its axes. Tensors that are one in memory share theirs (tied weights, also
    with their axes in another order), and those that overlap in any other way are frozen."""
    numbers = {k: v for k, v in state.items() if holds_numbers(v)}
    known: dict[Hashable, tuple[Labels, ...]] = {}
    shared: dict[Hashable, Labels] = {}
    found: dict[str, tuple[Labels, ...]] = {}
    for name, tensor in numbers.items():
        place = place_of(tensor)
        if place not in known:
            rank = {d: k for k, d in enumerate(axes_in_memory(tensor))} if address_of(tensor) else {}
            axes = []
            for d, n in enumerate(tensor.shape):
                key = (view_of(tensor), rank[d]) if d in rank else None
                labels = shared.get(key) if key is not None else None
                if labels is None:
                    labels = facts.fresh((n,))
                if key is not None:
                    shared[key] = labels
                axes.append(labels)
            known[place] = tuple(axes)
        found[name] = known[place]
    part = {id(t) for t in overlapping(list(numbers.values()))}
    for name, tensor in numbers.items():
        for each in found[name] if id(tensor) in part else ():
            facts.freeze(each, f"{name} lies in memory that is also another tensor's")
    return found
