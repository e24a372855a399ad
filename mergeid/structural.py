"""What the structure of a pair says of every space: margins relative to the fixed part that both models share.

The fixed part is a base checkpoint, or what asymmetric layers store. A's inputs on the calibration data span the
supports. A space is judged with B's other spaces as decided, because costs presume that a layer's inputs are matched,
and its own neurons as they lie, because that is the question. Stored fixed parts that coincide in another order of B
only (a space before was matched, or B was scrambled) are judged in that order, and the plan says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from mergeid.errors import MergeidError
from mergeid.graph.neuron_graph import Element, NeuronGraph, Space
from mergeid.identify.inputs import before_batchnorm, kind_of, supports
from mergeid.identify.layers import SpaceRecord, space_records
from mergeid.nn.names import FIXED, MASK, asymmetric_parameters

if TYPE_CHECKING:
    from torch import Tensor

    from mergeid.load import Loaded

Batches = Callable[[], Iterator[Mapping[str, Any]]]

EXACT, COLUMNS = 2048, 1024
"""Widest input whose covariance is kept whole, and columns of the sketch of wider ones: 34 MB a layer at most."""
POSITIONS = 32
"""Most positions (tokens, patches) of an example that count as inputs."""

NOTHING_SHARED = "no base and no stored fixed parts: every assignment costs the same and all margins are 0"
NO_DATA = "the supports of the layers' inputs need calibration data: give --data"
NO_DECISIONS = "structure stands beside the decisions, and --match {} makes none: use --match auto"
AS_THEY_LIE, AS_DECIDED = "as it lies", "as decided"
LEFT_OUT = "radii of stability (--certify computes them; slow above about a thousand neurons)"


def why_not(a: Mapping[str, Tensor], base: Mapping[str, Tensor] | None, data: bool, match: str) -> str | None:
    """Why nothing is computed, if so."""
    if base is None and not asymmetric_parameters(a):
        return NOTHING_SHARED
    if match != "auto":
        return NO_DECISIONS.format(match)
    return None if data else NO_DATA


def structure_of(
    graph: NeuronGraph,
    a: Loaded,
    b: Loaded,
    element: Element,
    batches: Batches,
    *,
    base: Mapping[str, Tensor] | None,
    certify: bool,
    seed: int,
) -> tuple[dict[str, SpaceRecord], dict[str, Any], list[str]]:
    """Records of the spaces that a layer makes, what was computed (for the JSON), and notes.

    Args:
        element: the decided permutations of B. Where a space was judged in another order is under "orders".
        batches: starts a pass over the calibration data.
        base: state dict under the model's keys; stored fixed parts come before it.
        certify: compute the shift radii of every layer too.
    """
    makers = _makers(graph, a)
    normed = before_batchnorm(a.model, next(batches()), a.forward)
    found = supports(
        a.model,
        batches(),
        a.forward,
        makers,
        centred=dict.fromkeys(normed, True),
        positions=POSITIONS,
        exact=EXACT,
        columns=COLUMNS,
        seed=seed,
    )
    states = [{k: v.detach().cpu() for k, v in m.state().items()} for m in (a, b)]
    origin = None if base is None else {k: v.detach().cpu() for k, v in base.items()}
    records: dict[str, SpaceRecord] = {}
    failed: dict[str, str] = {}
    orders: dict[str, list[str]] = {AS_THEY_LIE: [], AS_DECIDED: []}
    for space in graph.spaces:
        names = {axis.tensor for axis in space.axes}
        parts = {n + suffix for n in names for suffix in (FIXED, MASK)} & states[1].keys()
        how, order = _order(graph, space, element, parts, states)
        other = {n: graph.apply(order, n, states[1][n]) for n in names | parts}
        try:
            records |= space_records(
                replace(graph, spaces=[space]),
                a.model,
                states[0],
                other,
                found,
                base=origin,
                before_batchnorm=normed,
                certify=certify,
            )
            if how is not None:
                orders[how].append(space.id)
        except MergeidError as error:
            failed[space.id] = str(error)
    said: dict[str, Any] = {
        "computed": True,
        "sources": sorted({layer.source for r in records.values() for layer in r.layers}),
        "spaces": len(records),
        "identifiable": sum(r.identifiable for r in records.values()),
        "certified": certify,
        "left_out": failed if certify else {**failed, "stability": LEFT_OUT},
        "orders": {i: how for how, ids in orders.items() for i in ids},
    }
    notes = [
        f"{len(ids)} spaces have their structural margin with all of B {how}: only so both models store the same "
        "fixed parts"
        for how, ids in orders.items()
        if ids
    ]
    if failed:
        first, why = next(iter(failed.items()))
        notes.append(f"{len(failed)} spaces have no structural margin (first: {first}: {why})")
    return records, said, notes


def _order(
    graph: NeuronGraph, space: Space, element: Element, parts: set[str], states: Sequence[Mapping[str, Tensor]]
) -> tuple[str | None, Element]:
    """The order of B that a space is judged in, and its name where it is not the usual one: the first in which B's
    stored fixed parts are A's, else B as it lies."""
    plain = graph.identity()
    usual = {**element, space.id: graph.follow(space, element)}
    orders: tuple[tuple[str | None, Element], ...] = ((None, usual), (AS_THEY_LIE, plain), (AS_DECIDED, element))
    for how, order in orders:
        if all(n in states[0] and torch.equal(states[0][n], graph.apply(order, n, states[1][n])) for n in parts):
            return how, order
    return None, plain


def _makers(graph: NeuronGraph, a: Loaded) -> list[str]:
    """Layers with their neurons on a space; the inputs of all others are of no interest."""
    found: dict[str, None] = {}
    for space in graph.spaces:
        for axis in space.axes:
            name, _, last = axis.tensor.rpartition(".")
            if last != "weight" or not name:
                continue
            kind = kind_of(a.model.get_submodule(name))
            if kind is not None and axis.axis == (1 if kind in ("transposed linear", "embedding") else 0):
                found[name] = None
    return list(found)
