"""What the structure of a pair says of every space: margins relative to the fixed part that both models share, and
how far from the network's inputs on these hold the neurons in place.

The fixed part is a base checkpoint, or what asymmetric layers store. With calibration data, A's inputs span the
supports of the margins; the chain from the inputs on is judged without (`certified`). A space is judged with B's other
spaces as decided, because costs presume that a layer's inputs are matched, and its own neurons as they lie, because
that is the question. Stored fixed parts that coincide in another order of B only (a space before was matched, or B was
scrambled) are judged in that order, and the plan says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from mergeid.errors import MergeidError
from mergeid.evidence.anchored import IDENTIFIED, Certificate, certificates
from mergeid.evidence.decide import DIRECT, SpaceEvidence
from mergeid.evidence.entries import entries
from mergeid.evidence.hold import Fixed
from mergeid.evidence.inputs import Looks, before_batchnorm, kind_of, supports
from mergeid.evidence.layers import SpaceRecord, space_records
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph, Space
from mergeid.nn.names import FIXED, MASK, asymmetric_parameters
from mergeid.stages.gather import Batches
from mergeid.stages.open import Pair

if TYPE_CHECKING:
    from torch import Tensor

    from mergeid.models.loaded import Loaded

EXACT, COLUMNS = 2048, 1024
"""Widest input whose covariance is kept whole, and columns of the sketch of wider ones: 34 MB a layer at most."""
NEAR_CHANCE = 0.5
"""ι below which neurons correspond as they lie no better than half-way from chance to the best match."""
POSITIONS = 32
"""Most positions (tokens, patches) of an example that count as inputs."""

NOTHING_SHARED = "no base and no stored fixed parts: every assignment costs the same and all margins are 0"
ISOTROPIC = "taken as isotropic (P = I), because there is no calibration data"
NO_DATA = "margins and radii on the layers' inputs (they need calibration data: give --data)"
CHEAP = "another order of the neurons is just as cheap on the calibration inputs"
NO_DECISIONS = "structure only accompanies decisions, and --match {} makes none: use --match auto"
AS_THEY_LIE, AS_DECIDED = "as it lies", "as decided"
LEFT_OUT = "radii of stability (--certify computes them; slow above about a thousand neurons)"


@dataclass(frozen=True)
class StructureOfPair:
    """Attributes:
    records: space id -> margins, where a layer makes it. certificates: of all spaces.
    said: what was computed, for the plan's JSON. notes: for the user.
    """

    records: dict[str, SpaceRecord]
    certificates: dict[str, Certificate]
    said: dict[str, Any]
    notes: list[str]


def why_not(a: Mapping[str, Tensor], base: Mapping[str, Tensor] | None, match: str) -> str | None:
    """Why nothing is computed, if so."""
    if base is None and not asymmetric_parameters(a):
        return NOTHING_SHARED
    return NO_DECISIONS.format(match) if match != "auto" else None


def certified(
    pair: Pair,
    base: Mapping[str, Tensor] | None,
    *,
    orders: Mapping[str, Element] | None = None,
    refused: Mapping[str, str] | None = None,
) -> dict[str, Certificate]:
    """What the fixed parts say of every space, without data: `mergeid.evidence.anchored`.

    Args:
        orders: space id -> the order of B that it is judged in; default: as B lies. refused: see there.
    """
    graph, a = pair.graph, pair.a
    first, second = ({k: v.detach().cpu() for k, v in m.state().items()} for m in (a, pair.b))
    origin = {} if base is None else {k: v.detach().cpu() for k, v in base.items()}

    def of_b(space: str, name: str) -> Tensor | None:
        value = second.get(name)
        return value if value is None or not orders else graph.apply(orders[space], name, value)

    fixed = Fixed(lambda _, name: first.get(name), of_b, None if base is None else lambda _, name: origin.get(name))
    read = entries(a.model, a.example, a.forward)
    return certificates(graph, a.model, fixed, read, refused=refused)


def without_data(certificates: Mapping[str, Certificate], certify: bool) -> tuple[dict[str, Any], list[str]]:
    """What was judged without data (for the JSON), and a note: why the structure decides, or why it does not."""
    known = list(certificates.values())
    held = [c for c in known if c.says == IDENTIFIED]
    decides = bool(known) and len(held) == len(known)
    said: dict[str, Any] = {
        "computed": True,
        "inputs": ISOTROPIC,
        "spaces": len(known),
        "identified": len(held),
        "decides": decides,
        "left_out": {"margins": NO_DATA},
    }
    notes = []
    if decides:
        notes.append(
            "no calibration data is needed for the order of the neurons: the fixed parts that both models share reach "
            "from the network's inputs to every space and hold all neurons in place in both; the inputs of every layer "
            f"were {ISOTROPIC}. How much the merge loses is a separate question: measure it with mergeid barrier"
        )
    elif known:
        first = next(c for c in known if c.says != IDENTIFIED)
        notes.append(
            f"structure identifies only {len(held)} of {len(known)} spaces, so it decides nothing (first: "
            f"{first.space}: "
            f"{first.why})"
        )
    if certify:
        notes.append("--certify needs --data: the radii concern the layers' inputs")
    return said, notes


def structure_of(
    pair: Pair,
    element: Element,
    batches: Batches,
    base: Mapping[str, Tensor] | None,
    certify: bool,
    seed: int,
) -> StructureOfPair:
    """Records of the spaces that a layer makes, and certificates of all.

    Args:
        element: the decided permutations of B. Where a space was judged in another order, `said` has it under
            "orders".
        batches: starts a pass over the calibration data.
        base: state dict under the model's keys; stored fixed parts come before it.
        certify: compute the shift radii of every layer too.
    """
    graph, a = pair.graph, pair.a
    makers = _makers(graph, a)
    normed = before_batchnorm(a.model, batches()[0], a.forward)
    found = supports(
        a.model,
        batches(),
        a.forward,
        makers,
        centred=dict.fromkeys(normed, True),
        reading=Looks(POSITIONS, EXACT, COLUMNS, seed),
    )
    states = [{k: v.detach().cpu() for k, v in m.state().items()} for m in (a, pair.b)]
    origin = None if base is None else {k: v.detach().cpu() for k, v in base.items()}
    records: dict[str, SpaceRecord] = {}
    failed: dict[str, str] = {}
    orders: dict[str, list[str]] = {AS_THEY_LIE: [], AS_DECIDED: []}
    judged_in: dict[str, Element] = {}
    for space in graph.spaces:
        names = {axis.tensor for axis in space.axes}
        parts = {n + suffix for n in names for suffix in (FIXED, MASK)} & states[1].keys()
        how, order = _order(graph, space, element, parts, states)
        judged_in[space.id] = order
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
    refused = {i: CHEAP for i, record in records.items() if not record.identifiable}
    found_out = certified(pair, base, orders=judged_in, refused=refused)
    said: dict[str, Any] = {
        "computed": True,
        "inputs": "calibration data",
        "sources": sorted({layer.source for r in records.values() for layer in r.layers}),
        "spaces": len(records),
        "identifiable": sum(r.identifiable for r in records.values()),
        "identified": sum(c.says == IDENTIFIED for c in found_out.values()),
        "certified": certify,
        "left_out": failed if certify else {**failed, "stability": LEFT_OUT},
        "orders": {i: how for how, ids in orders.items() for i in ids},
    }
    notes = [
        f"{len(ids)} spaces have their structural margin with all of B {how}: only then do both models store the "
        "same fixed parts"
        for how, ids in orders.items()
        if ids
    ]
    if failed:
        first, why = next(iter(failed.items()))
        notes.append(f"{len(failed)} spaces have no structural margin (first: {first}: {why})")
    return StructureOfPair(records, found_out, said, notes)


def contradictions(spaces: Sequence[SpaceEvidence], orders: Mapping[str, str]) -> list[str]:
    """A note on the spaces that the structure identifies as they lie, though their activations correspond no better so
    than at random; nothing where there are none.

    Args:
        orders: space id -> the order of B that it was judged in, where it is not the usual one."""
    found = [
        s
        for s in spaces
        if s.certificate is not None
        and s.certificate.says == IDENTIFIED
        and s.decision != DIRECT
        and orders.get(s.id) != AS_DECIDED
        and s.iota is not None
        and s.iota < NEAR_CHANCE
    ]
    if not found:
        return []
    worst = min(found, key=lambda s: s.iota or 0.0)
    return [
        f"structure and activations contradict each other in {len(found)} of {len(spaces)} spaces (worst: "
        f"{worst.label}: identified by structure as is, but ι = {worst.iota:.2f}, where 0 is chance); the "
        "activations decide"
    ]


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
