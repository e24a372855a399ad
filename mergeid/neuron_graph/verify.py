"""Prove a neuron graph on the spot: random group elements must leave the model's outputs unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import inf, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mergeid.basics.aliases import first_names
from mergeid.basics.casting import in_precision, kept_kind
from mergeid.basics.memory import SMALL_NETWORK
from mergeid.basics.nested import mapped, returned_tensors
from mergeid.basics.on_demand import OnDemand, light_copy
from mergeid.basics.state import forget_derived, uncompiled
from mergeid.errors import MergeidError
from mergeid.neuron_graph.composed import HigherOrderOperator, plain_calls
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph
from mergeid.neuron_graph.settle import own_statistics, shaken

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest relative output error that counts as unchanged (rounding of deep networks is far below it)."""
SAMPLED = 256
"""Rows of a weight that say whether it is constant, where it is not held in memory."""
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


def randomised(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """A state dict in which no wrong permutation can hide: constant tensors (fresh BatchNorm statistics, LayerScale,
    zero-initialised layers) get values that differ from neuron to neuron, and gates that are 0 open."""
    state = {}
    for name, value in model.state_dict().items():
        if isinstance(value, OnDemand):
            state[name] = _disturbed(value, generator)
        elif value.is_floating_point() and value.numel() > 1:
            wide = value if value.dtype == torch.float64 else value.float()
            noise = torch.rand(value.shape, generator=generator).to(value.device)
            spread = float(wide.std())
            if "running_var" in name:
                wide = (wide.abs() + 0.1) * (0.5 + noise)
            elif not spread >= 1e-6:  # also where it is not finite
                wide = wide + 0.4 * (noise - 0.5)
            else:
                wide = wide + 0.1 * spread * (noise - 0.5)
            state[name] = wide.to(value.dtype)
        elif value.is_floating_point() and value.numel() == 1 and not value.is_meta and float(value) == 0:
            state[name] = torch.full_like(value, 0.5)
        else:
            state[name] = value.clone()
    return state


def _disturbed(value: OnDemand, generator: torch.Generator) -> Tensor:
    """A weight that is formed on demand: as it is, unless its first rows say that it is constant."""
    if value.numel() == 1 or float(value[:SAMPLED].float().std()) >= 1e-6:
        return value.clone()
    noise = torch.rand(value.shape, generator=generator).to(value.device)
    return (value.whole() + 0.4 * (noise - 0.5)).to(value.dtype)


def _copied(model: nn.Module) -> nn.Module:
    """Of a small model a copy with matrices of its own; that of a larger one forms them as it runs."""
    large = sum(p.numel() for p in model.parameters()) > SMALL_NETWORK
    return light_copy(model) if large else copy.deepcopy(model)


class at_least(TorchDispatchMode):
    """Casts to a shorter float that the model's own code asks for (norms in float32, say) go to `dtype` instead, so
    that a check in float64 has its precision throughout."""

    supports_higher_order_operators = True

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(func, HigherOrderOperator):
            with self:
                return (plain_calls(func) or func)(*args, **kwargs)
        asked = kwargs.get("dtype")
        if asked is not None and asked.is_floating_point and asked.itemsize < self.dtype.itemsize:
            kwargs["dtype"] = self.dtype
        elif asked is not None and asked.is_complex and asked.itemsize < 2 * self.dtype.itemsize:
            kwargs["dtype"] = torch.complex128 if self.dtype == torch.float64 else torch.complex64
        return func(*args, **kwargs)


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
        randomise: disturb the weights first, see `randomised`.

    Returns:
        a `Verification`; its graph carries ``verified`` with the error seen, and under ``noise`` the names of outputs
        that were left out because rounding alone changes them as much (boxes around a mask that lies on its threshold).

    Raises:
        MergeidError: an output is NaN.
    """
    probe = _copied(model).eval()
    state = randomised(probe, generator) if randomise else {k: v.clone() for k, v in probe.state_dict().items()}

    noise: list[str] = []
    wider = dtype == torch.float32  # where its rounding is too coarse
    cuda = sorted({p.device.index for p in probe.parameters() if p.is_cuda})

    def run(change: Callable[[str, Tensor], Tensor] = lambda _, value: value) -> dict[str, Tensor]:
        with torch.no_grad():
            for name, value in probe.state_dict().items():
                value.copy_(change(name, state[name]))  # one tensor at a time: large models fit
        forget_derived(probe)
        # a model that draws random numbers draws the same ones every time
        with torch.no_grad(), uncompiled(), at_least(dtype), torch.random.fork_rng(cuda):
            torch.manual_seed(0)
            out = forward(probe, mapped(inputs, lambda t: _cast(t, dtype)))
        return {name: _real(t) for name, t in returned_tensors(out).items() if name not in noise}

    try:
        probe = in_precision(probe, dtype)
        reference = run()
        if dtype != torch.float32 and _any_nan(reference):
            raise RuntimeError("attention masks filled with the lowest float overflow to infinity")
    except (RuntimeError, NotImplementedError):
        if dtype == torch.float32:
            raise
        # some kernels refuse float64, some models are made for float32
        dtype = torch.float32
        probe = in_precision(probe, dtype)
        reference = run()
    if randomise and _any_nan(reference):  # too much for the disturbed weights
        state = model.state_dict()
        reference = run()
    if _any_nan(reference):
        raise MergeidError(
            f"the outputs of {type(model).__name__} on its example inputs are not numbers (NaN), so its graph cannot "
            f"be verified; give inputs and weights for which its outputs are finite"
        )
    tolerance = TOLERANCE[dtype]

    apart: dict[str, float] = {}

    def error(g: NeuronGraph, element: Element) -> float:
        nonlocal apart
        apart = _errors(reference, run(partial(g.apply, element)))
        return max(apart.values(), default=0.0)

    def rounded() -> dict[str, Tensor]:
        return run(shaken(generator, dtype))

    failed: list[str] = []
    settled = not randomise
    while True:
        worst = 0.0
        for _ in range(samples if graph.spaces else 0):
            worst = max(worst, error(graph, graph.random_element(generator)))
            if worst > tolerance:
                break
        holds = worst <= tolerance
        power = _power(graph, error, tolerance, generator, first_names(probe.state_dict())) if holds else None
        blind = power is not None and power <= tolerance
        chaotic = not holds and _largest(reference, rounded()) > tolerance / 10
        if not settled and (blind or chaotic):
            # the weights are to blame: they magnify rounding errors as much, or nothing comes through
            settled = True
            with own_statistics(probe):
                run()
            state = {k: v.clone() for k, v in probe.state_dict().items()}
            reference = run()
        elif chaotic and wider:
            wider, dtype, tolerance = False, torch.float64, TOLERANCE[torch.float64]
            probe = in_precision(probe, dtype)
            reference = run()
        elif holds and not blind:
            break
        elif not holds and (found := _noise(apart, reference, rounded, tolerance)):
            noise += found
            reference = {k: v for k, v in reference.items() if k not in noise}
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
        "dtype": str(dtype).removeprefix("torch."),
        **({"noise": noise} if noise else {}),
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


def _noise(
    apart: Mapping[str, float],
    reference: Mapping[str, Tensor],
    shake: Callable[[], dict[str, Tensor]],
    tolerance: float,
) -> list[str]:
    """The outputs that a permutation has changed (by `apart`) and rounding alone changes as much, in one of `SHAKES`
    draws: something in them turns over at a threshold. Empty where one has changed that rounding does not change, or
    none would be left."""
    changed = {name for name, error in apart.items() if error > tolerance}
    left = set(changed)
    if len(changed) == len(apart):
        return []
    for _ in range(SHAKES):
        left -= {name for name, error in _errors(reference, shake()).items() if error >= apart[name] / 10}
        if not left:
            return sorted(changed)
    return []


def _any_nan(outputs: Mapping[str, Tensor]) -> bool:
    """Infinities are masked logits; a single number beside other outputs may be a mean over nothing."""
    return any(bool(t.isnan().any()) for t in outputs.values() if t.numel() > 1 or len(outputs) == 1)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy: the model may write into its inputs."""
    return tensor.detach().to(kept_kind(tensor, dtype), copy=True)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor).double() if tensor.is_complex() else tensor.double()


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


def _errors(reference: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
    return {n: relative_error([a], [other[n]]) if n in other else inf for n, a in reference.items()}


def _largest(reference: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return max(_errors(reference, other).values(), default=0.0)


MASKED = 1e30
"""Numbers beyond this are masks (infinity, or the lowest number of a shorter float), not results."""


def relative_error(reference: list[Tensor], other: list[Tensor]) -> float:
    """max |a − b| / max |a| over the outputs, without what is masked (or no number) in both; infinite where only one
    is."""
    worst = 0.0
    for a, b in zip(reference, other, strict=True):
        masked = ~(a.abs() < MASKED)
        if not torch.equal(masked, ~(b.abs() < MASKED)):
            return float("inf")
        if bool(masked.all()):  # also: empty
            continue
        scale = a[~masked].abs().max().item()
        apart = (a - b)[~masked].abs().max().item()
        value = apart / scale if scale > 0 else apart
        worst = max(worst, value if value == value else float("inf"))
    return worst
