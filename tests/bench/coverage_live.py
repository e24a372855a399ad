"""One live module, checked from outside: `mergeid.graph(module, example_inputs)`, then a test of its own that every
tensor the module returns stays as it is."""

from __future__ import annotations

import copy
import importlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from coverage_check import Batch, described
from torch import Tensor, nn

import mergeid
from mergeid.neuron_graph import NeuronGraph
from mergeid.plugins import MergeidError

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest change of an output, over the largest number in it, that counts as rounding."""

NO_SPACE = "no space is free: "
Draw = Callable[[torch.Generator, int], Batch]
"""``draw(generator, examples)`` -> keyword inputs."""


@dataclass
class Live:
    """A module of a library that no adapter knows.

    Attributes:
        model: random weights.
        draw: its inputs; an argument that a module takes by position is named after the parameter.
        note: what a reader of the table must know.
        frozen: why no space is free, where that is right.
    """

    model: nn.Module
    draw: Draw
    note: str = ""
    frozen: str = ""


def built(models: Mapping[str, Callable[[], tuple[nn.Module, Draw]]], name: str, frozen: str = "") -> Live:
    """The model of that name, with seeded weights."""
    torch.manual_seed(0)
    return Live(*models[name](), frozen=frozen)


def bench_of(
    models: Mapping[str, Callable[[], tuple[nn.Module, Draw]]], library: str
) -> tuple[Callable[[], list[str]], Callable[[], dict[str, str]], Callable[[str], Live]]:
    """`names`, `families` and `make` of a table's module, where nothing is special."""

    def names() -> list[str]:
        importlib.import_module(library)  # before the bench forks
        return list(models)

    return names, lambda: by_prefix(models), partial(built, models)


def by_prefix(names: Iterable[str]) -> dict[str, str]:
    """Name -> its family, which stands before the slash."""
    return {name: name.partition("/")[0] for name in names}


def check(case: Live, seed: int = 0) -> dict[str, Any]:
    """A row of the table. ``verified``: the product's own verification had to freeze nothing; ``held_again``: under two
    group elements, other weights, other and more inputs, every returned tensor is the same."""
    model = case.model.eval()
    example = case.draw(_seeded(seed), 2)
    parameters = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        began = time.process_time()
        count = len(list(returned(model(**copy.deepcopy(example)))))  # some write into what they are given
        forward = time.process_time() - began
    began = time.process_time()
    graph = mergeid.graph(model, example_inputs=example, seed=seed)
    seconds = time.process_time() - began
    refuted = sorted({f"{t}[{a}]" for t, a, why in graph.frozen if why.startswith("verification:")})
    checked = graph.verified or {}
    row = {
        **described(graph, parameters, seconds, forward),
        "verified": int(not refuted),
        "error": f"{checked.get('max_relative_error', 0.0):.1e}",
        "failed": " ".join(refuted[:3]),
        "note": "; ".join(x for x in (case.note, f"{count} tensors returned") if x),
    }
    if not graph.spaces and case.frozen and not refuted:
        row["note"] = f"{row['note']}; {NO_SPACE}{case.frozen}"
    if graph.spaces:
        moved, wrong, dtype = changes(graph, model, case.draw, seed)
        tolerance = TOLERANCE[dtype]
        row["held_again"] = int(moved <= tolerance and (wrong is None or wrong > tolerance))
        row["error_again"] = f"{moved:.1e}"
        row["dtype"] = str(dtype).removeprefix("torch.")
        if wrong is not None and wrong <= tolerance:
            row["failed"] = f"no element changes the outputs, not even a wrong one ({wrong:.0e})"
    return row


def changes(graph: NeuronGraph, model: nn.Module, draw: Draw, seed: int) -> tuple[float, float | None, torch.dtype]:
    """(largest change under two group elements, change where every space moves on one axis alone, dtype)."""
    generator = _seeded(seed + 1)
    inputs = draw(generator, 3)
    elements = [graph.random_element(generator) for _ in range(2)]
    can_be_wrong = any(len(s.axes) > 1 for s in graph.spaces)
    state = shaken(model, generator)
    for dtype in (torch.float64, torch.float32):
        try:
            probe = copy.deepcopy(model).to(dtype)
            cast = _cast(inputs, dtype)
            reference = run(probe, state, cast)
            if not all(bool(t.isfinite().any()) for t in reference):
                state = dict(model.state_dict())  # too much for shaken weights
                reference = run(probe, state, cast)
        except (RuntimeError, NotImplementedError):
            if dtype == torch.float32:
                raise
            continue  # parts of it are written for float32
        found = max(_apart(reference, run(probe, graph.apply_state(e, state), cast)) for e in elements)
        rounding = _rounding(probe, state, cast, reference, generator)
        if dtype == torch.float64 and TOLERANCE[dtype] < found < 10 * rounding:
            continue  # parts of it run in float32 whatever it is cast to
        astray = 0.0
        for k in range(max(len(s.axes) for s in graph.spaces) if can_be_wrong else 0):  # not every axis matters
            if astray <= TOLERANCE[dtype]:
                moved = _on_one_axis(graph, k).apply_state(elements[0], state)
                astray = max(astray, _apart(reference, run(probe, moved, cast)))
        return found, astray if can_be_wrong else None, dtype
    raise MergeidError("runs neither in float64 nor in float32")


def _on_one_axis(graph: NeuronGraph, k: int) -> NeuronGraph:
    """Every space that has several axes on its k-th alone: not a symmetry."""
    return replace(
        graph,
        spaces=[replace(s, axes=(s.axes[k % len(s.axes)],) if len(s.axes) > 1 else ()) for s in graph.spaces],
    )


def _rounding(
    model: nn.Module, state: Mapping[str, Tensor], inputs: Batch, reference: list[Tensor], generator: torch.Generator
) -> float:
    """The change of the outputs where every weight changes as much as float32 rounds."""
    nearly = {
        k: v.double() * (1 + 6e-8 * torch.randn(v.shape, generator=generator)) if v.is_floating_point() else v
        for k, v in state.items()
    }
    return _apart(reference, run(model, nearly, inputs))


def run(model: nn.Module, state: Mapping[str, Tensor], inputs: Batch) -> list[Tensor]:
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(state[name])
    model.train()
    model.eval()  # drops what it keeps of earlier weights
    torch.manual_seed(0)
    with torch.no_grad():
        out = list(returned(model(**copy.deepcopy(inputs))))
    return [t.double() for t in out]


def returned(tree: Any) -> Iterator[Tensor]:
    """Every floating-point tensor in whatever a module returns."""
    if isinstance(tree, Tensor):
        if tree.is_complex():
            yield torch.view_as_real(tree)
        elif tree.is_floating_point():
            yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from returned(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from returned(value)
    elif is_dataclass(tree) and not isinstance(tree, type):
        for f in fields(tree):
            yield from returned(getattr(tree, f.name))


def shaken(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Weights in which no two neurons are alike: fresh statistics, zero-initialised layers and gates move too."""
    state = {}
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            state[name] = value.clone()
            continue
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        wide = value.detach().double()
        spread = float(wide.std()) if wide.numel() > 1 else 0.0
        if name.endswith("running_var"):
            state[name] = (wide + 0.1) * (1 + 0.2 * noise).abs() + 0.1
        else:
            state[name] = wide + noise * (0.2 * spread if spread > 1e-6 else 0.1)
    return state


def _apart(reference: list[Tensor], other: list[Tensor]) -> float:
    assert len(reference) == len(other) > 0
    worst = 0.0
    for a, b in zip(reference, other, strict=True):
        plain = a.isfinite() & (a.abs() < 1e30)
        if not torch.equal(plain, b.isfinite() & (b.abs() < 1e30)):
            return float("inf")
        if bool(plain.any()):
            scale = float(a[plain].abs().max())
            worst = max(worst, float((a - b)[plain].abs().max()) / (scale or 1.0))
    return worst


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(dtype) if tree.is_floating_point() else tree
    if isinstance(tree, Mapping):
        return {k: _cast(v, dtype) for k, v in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(_cast(v, dtype) for v in tree)
    return tree


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
