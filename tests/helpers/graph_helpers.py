"""Trace a module, and try whether its graph holds, without `mergeid.neuron_graph.verify`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph, Space
from mergeid.neuron_graph.trace import trace
from mergeid.neuron_graph.verify import verify

Run = Callable[[nn.Module, Any], Any]


class TwoLayers(nn.Module):
    """Layers `a` and `b` of these sizes, for a forward pass of one's own."""

    def __init__(self, inputs: int = 6, width: int = 8, outputs: int = 3) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(inputs, width), nn.Linear(width, outputs)


def call(model: nn.Module, inputs: Any) -> Any:
    """A dict is keywords, a tuple positions."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A module whose tensors all differ from neuron to neuron (also statistics and zero-initialised layers), in eval
    mode and float64."""
    torch.manual_seed(seed)
    return disturbed(make(), seed)


def disturbed(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    done = set()
    with torch.no_grad():
        for name, value in model.state_dict(keep_vars=True).items():
            if not value.is_floating_point() or id(value) in done or value.numel() == 0:
                continue
            done.add(id(value))
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            spread = float(value.std()) if value.numel() > 1 else 0.0
            value += noise * (0.3 * spread if spread > 1e-6 else 0.2)
            if "running_var" in name:
                value.abs_().add_(0.2)
    return model


def traced(model: nn.Module, inputs: Any, run: Run = call) -> NeuronGraph:
    return trace(model, inputs, lambda: run(model, inputs), name=type(model).__name__)


def change(graph: NeuronGraph, element: Element, model: nn.Module, inputs: Any, run: Run = call) -> float:
    """Largest change of an output under a group element, over the largest output."""
    outputs = []
    for state in (model.state_dict(), graph.apply_state(element, model.state_dict())):
        probe = copy.deepcopy(model)
        probe.load_state_dict(state)
        with torch.no_grad():
            out = run(probe, copy.deepcopy(inputs))
        outputs.append(floats(out))
    assert outputs[0]
    worst = 0.0
    for x, y in zip(*outputs, strict=True):
        assert torch.isfinite(x).all()
        worst = max(worst, float((x - y).abs().max() / x.abs().max().clamp(min=1e-300)))
    return worst


def floats(out: Any) -> list[Tensor]:
    """Every floating tensor in a nest of tuples, lists, dicts and dataclasses."""
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() else []
    if isinstance(out, Mapping):
        parts = list(out.values())
    elif dataclasses.is_dataclass(out):
        parts = [getattr(out, f.name) for f in dataclasses.fields(out)]
    else:
        parts = list(out) if isinstance(out, (tuple, list)) else []
    return [t for part in parts for t in floats(part)]


def worst_change(graph: NeuronGraph, model: nn.Module, inputs: Any, run: Run = call, samples: int = 3) -> float:
    """Over random elements, and over elements that move one space alone."""
    generator = torch.Generator().manual_seed(1)
    elements = [graph.random_element(generator) for _ in range(samples)]
    elements += [graph.random_element(generator, only=[s.id]) for s in graph.spaces[:8]]
    return max((change(graph, e, model, inputs, run) for e in elements), default=0.0)


def in_double(inputs: Any) -> Any:
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)


def sound(make: Callable[[], nn.Module], inputs: Any, run: Run = call, *, tolerance: float = 1e-9) -> NeuronGraph:
    """The graph of a module as traced; every group element that was tried leaves the outputs unchanged, and
    verification freezes nothing."""
    model, inputs = seeded(make), in_double(inputs)
    graph = traced(model, inputs, run)
    found = worst_change(graph, model, inputs, run)
    assert found < tolerance, f"the output changes by {found:.1e}: {[(s.label, s.group) for s in graph.spaces]}"
    checked = verify(graph, model, inputs, run, generator=torch.Generator().manual_seed(0))
    assert checked.failed == ()
    assert checked.error < 1e-6
    return graph


def on(graph: NeuronGraph, tensor: str, axis: int) -> list[Space]:
    """The spaces on an axis."""
    return [s for s, a in graph.on_tensor.get(tensor, []) if a.axis == axis]


def only(graph: NeuronGraph, tensor: str, axis: int) -> Space:
    """The one space that covers an axis."""
    (space,) = on(graph, tensor, axis)
    (index,) = (a.index for a in space.axes if (a.tensor, a.axis) == (tensor, axis))
    assert (index >= 0).all()
    return space


def shape(graph: NeuronGraph) -> list[tuple[Any, ...]]:
    """What a graph says but for the names of its spaces."""
    return [
        (s.size, s.blocks, s.parents, s.block_parents.tolist(), [(a.tensor, a.axis, a.index.tolist()) for a in s.axes])
        for s in graph.spaces
    ]


def permutations_of(graph: NeuronGraph, seed: int = 0) -> Element:
    return graph.random_element(torch.Generator().manual_seed(seed))


def composed(first: Element, second: Element) -> Element:
    """First `first`, then `second`."""
    return {k: first[k][second[k]] for k in first}


def inverse(element: Element) -> Element:
    return {k: np.argsort(p) for k, p in element.items()}
