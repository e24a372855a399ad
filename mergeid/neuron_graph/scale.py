"""The graph of a model too large to run: traced on the meta device, proven on a smaller model of the same code."""

from __future__ import annotations

import re

from mergeid.neuron_graph.neuron_graph import NeuronGraph, Space

Place = tuple[str, int]
"""A tensor's name without its numbers, and an axis: layers of one kind share their places."""


def _places(space: Space) -> set[Place]:
    return {_place(a.tensor, a.axis) for a in space.axes}


def _place(tensor: str, axis: int) -> Place:
    return re.sub(r"\d+", "#", tensor), axis


def proven_on(large: NeuronGraph, small: NeuronGraph, what: str) -> NeuronGraph:
    """The large model's graph as far as the small model's verified graph bears it out.

    What failed in the small model is frozen in the large one, at the same places of every layer. ``verified`` of the
    result is that of the small graph, with what it was (``"on"``), and at how many of the places where neurons of the
    large model may move those of the small one were seen to move (``"places"`` of ``"of"``).

    Args:
        large: traced, not verified.
        small: verified, of the same architecture.
        what: what the small model is, in words.
    """
    wrong = {_place(t, a) for t, a, why in small.frozen if why.startswith("verification:")}
    lost = [s.id for s in large.spaces if _places(s) & wrong]
    if lost:
        large = large.without(lost, f"verification: the output changed in {what}")
    free = {p for s in large.spaces for p in _places(s)}
    seen = {p for s in small.spaces for p in _places(s)}
    large.verified = {**(small.verified or {}), "on": what, "places": len(free & seen), "of": len(free)}
    return large
