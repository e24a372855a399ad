"""Elements into a common order (the universe) and the maps between models that follow from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mergeid.neuron_graph.neuron_graph import Element


def composed(outer: Element, inner: Element) -> Element:
    """First `inner`, then `outer`."""
    return {k: inner[k][p] for k, p in outer.items()}


def inverse(element: Element) -> Element:
    return {k: np.argsort(p) for k, p in element.items()}


def relative(universe: Sequence[Element], p: int, q: int) -> Element:
    """The element that brings model q into the order of model p, through the universe."""
    return composed(inverse(universe[p]), universe[q])
