"""Prove a neuron graph on the spot: random group elements must leave the model's outputs unchanged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from mergeid.basics.aliases import first_names
from mergeid.basics.state import tensors_of
from mergeid.neuron_graph.compare import errors, measures
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph
from mergeid.neuron_graph.probe import Probe
from mergeid.neuron_graph.settle import shaken
from mergeid.request.boundary import explained

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest relative output error that counts as unchanged (rounding of deep networks is far below it)."""
SHAKES = 24
"""Draws of rounding errors that show whether an output is nothing but noise."""


@dataclass(frozen=True)
class Verification:
    """Attributes:
    graph: the graph that holds (smaller than the one given if some spaces failed).
    error: worst relative error of the accepted group elements.
    failed: ids of the spaces that had to be frozen.
    """

    graph: NeuronGraph
    error: float
    failed: tuple[str, ...]


def verify(
    graph: NeuronGraph,
    model: nn.Module,
    inputs: Any,
    forward: Callable[[nn.Module, Any], Any],
    *,
    generator: torch.Generator,
    samples: int = 2,
    dtype: torch.dtype = torch.float64,
    randomise: bool = True,
) -> Verification:
    """Apply random group elements to the model and compare its outputs; freeze the smallest set of spaces that fails.

    Args:
        model: not modified (a copy of it runs in `dtype`).
        forward: ``forward(model, inputs)`` returns all outputs that a caller reads, in any nest.
        samples: group elements tried (and again after something was frozen).
        randomise: disturb the weights first (`mergeid.neuron_graph.probe.randomised`).

    Returns:
        a `Verification`; its graph carries ``verified`` with the error seen, and under ``noise`` the names of outputs
        that were left out because rounding alone changes them as much (boxes around a mask that lies on its threshold).

    Raises:
        MergeidError: an output is NaN.
    """
    probe = Probe(model, inputs, forward, generator, dtype=dtype, randomise=randomise)
    wider = dtype == torch.float32  # where its rounding is too coarse
    reference = probe.start()
    tolerance = TOLERANCE[probe.dtype]

    apart: dict[str, float] = {}
    changed: dict[str, Tensor] = {}
    measured: dict[str, Tensor] = {}

    def compared(outputs: dict[str, Tensor]) -> dict[str, float]:
        return errors(reference, outputs, measured)

    def error(g: NeuronGraph, element: Element) -> float:
        nonlocal apart, changed
        try:
            changed = probe.run(partial(g.apply, element))
        except Exception as refusal:  # a check of the model's own that other weights do not pass
            if explained(refusal) is not None:
                raise
            changed = {}
        apart = compared(changed)
        return max(apart.values(), default=0.0)

    def rounded() -> dict[str, float]:
        return compared(probe.run(shaken(generator, probe.dtype)))

    failed: list[str] = []
    settled = not randomise
    while True:
        worst = 0.0
        for _ in range(samples if graph.spaces else 0):
            worst = max(worst, error(graph, graph.random_element(generator)))
            if worst > tolerance:
                break
        holds = worst <= tolerance
        power = _power(graph, error, tolerance, generator, first_names(tensors_of(probe.model))) if holds else None
        if power is not None and not measured and (measured := measures(reference, changed)):
            continue  # judged by the wrong measure
        blind = power is not None and power <= tolerance
        chaotic = not holds and max(rounded().values(), default=0.0) > tolerance / 10
        if not settled and (blind or chaotic):
            # the weights are to blame: they magnify rounding errors as much, or nothing comes through
            settled = True
            reference, measured = probe.settle(), {}
        elif chaotic and wider:
            wider, tolerance = False, TOLERANCE[torch.float64]
            reference, measured = probe.in_precision(torch.float64), {}
        elif holds and not blind:
            break
        elif not holds and (found := _noise(apart, rounded, tolerance)):
            probe.noise += found
            reference = {k: v for k, v in reference.items() if k not in found}
        else:
            ids = [s.id for s in graph.spaces]
            bad = (not blind and _bisect(graph, ids, error, tolerance, generator)) or ids
            why = "outputs compared do not depend on these weights" if blind else "output changed under a permutation"
            failed += bad
            graph = graph.without(bad, f"verification: the {why}")
    graph.verified = {
        "max_relative_error": worst,
        "error_when_misapplied": power,
        "samples": samples,
        "dtype": str(probe.dtype).removeprefix("torch."),
        **({"noise": probe.noise} if probe.noise else {}),
    }
    return Verification(graph, worst, tuple(failed))


def _power(
    graph: NeuronGraph,
    error: Callable[[NeuronGraph, Element], float],
    tolerance: float,
    generator: torch.Generator,
    same: Mapping[str, str],
) -> float | None:
    """The error when every space moves on one of its axes only: a check that does not see that proves nothing.

    The axes of large tensors are tried first, then others: a bias in front of a norm has no effect, and elements of a
    small group may be the identity. None where no space has two axes.

    Args:
        same: name -> first name of the same tensor, which moves under all its names or not at all.
    """
    places: dict[str, list[tuple[str, int]]] = {}
    for space in graph.spaces:
        found_on = {(same[a.tensor], a.axis): -prod(graph.tensors[a.tensor]) for a in space.axes}
        places[space.id] = sorted(found_on, key=lambda place: found_on[place])
    if not any(len(found_on) > 1 for found_on in places.values()):
        return None
    found = 0.0
    for k in range(4):
        alone = []
        for space in graph.spaces:
            of = places[space.id]
            chosen = of[k % len(of)] if len(of) > 1 else None
            alone.append(replace(space, axes=tuple(a for a in space.axes if (same[a.tensor], a.axis) == chosen)))
        found = max(found, error(replace(graph, spaces=alone), graph.random_element(generator)))
        if found > tolerance:
            break
    return found


def _noise(apart: Mapping[str, float], shake: Callable[[], dict[str, float]], tolerance: float) -> list[str]:
    """The outputs that a permutation has changed (by `apart`) and rounding alone (`shake`) changes as much, in one of
    `SHAKES` draws: something in them turns over at a threshold. Empty where one has changed that rounding does not
    change, or none would be left."""
    changed = {name for name, error in apart.items() if error > tolerance}
    left = set(changed)
    if len(changed) == len(apart):
        return []
    for _ in range(SHAKES):
        left -= {name for name, error in shake().items() if error >= apart[name] / 10}
        if not left:
            return sorted(changed)
    return []


def _bisect(
    graph: NeuronGraph,
    ids: list[str],
    error: Callable[[NeuronGraph, Element], float],
    tolerance: float,
    generator: torch.Generator,
) -> list[str]:
    """The spaces among `ids` that change the output when they alone move."""
    if error(graph, graph.random_element(generator, only=ids)) <= tolerance:
        return []
    if len(ids) == 1:
        return ids
    half = len(ids) // 2
    return [
        *_bisect(graph, ids[:half], error, tolerance, generator),
        *_bisect(graph, ids[half:], error, tolerance, generator),
    ]
