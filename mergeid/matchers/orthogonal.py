"""Orthogonal maps of RMSNorm residual streams (Generalized LMC for Transformers, Theus et al. 2025; SliceGPT, Ashkboos
et al. 2024).

RMSNorm without a gain commutes with every orthogonal Q, so that a pre-norm residual stream may be rotated: whatever
writes it is multiplied by Q, whatever reads it by Qᵀ. Gains are absorbed into the layers that read the norm's output
first. Both steps are tried on the model in float64, and what changes an output is not used. Q comes from orthogonal
Procrustes on the weights: it maximises the sum of inner products of all tensors on the stream.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from mergeid.basics.hooks import listening
from mergeid.basics.state import evaluating, tensors_of
from mergeid.matchers.inner_products import rows
from mergeid.matchers.scaling import TOLERANCE, Forward, changes
from mergeid.neuron_graph.neuron_graph import NeuronGraph, Space


@dataclass(frozen=True)
class Stream:
    """A residual stream that may be rotated, proven.

    Attributes:
        space: id of its space.
        size: its width.
        axes: (tensor, axis) that Q acts on.
    """

    space: str
    size: int
    axes: tuple[tuple[str, int], ...]


def absorb_gains(model: nn.Module, forward: Forward, batch: Any) -> dict[str, Tensor]:
    """The state dict with the gain of every norm (a module with one vector, its `weight`) that only linear layers read
    multiplied into these, and 1 in its place; the function is the same, else the norm stays as it is."""
    work = evaluating(copy.deepcopy(model)).double()
    state = {k: v.clone() for k, v in tensors_of(work).items()}
    for norm, readers in _readers(work, forward, batch).items():
        gain = f"{norm}.weight"

        def absorbed(s: dict[str, Tensor], gain: str = gain, readers: list[str] = readers) -> dict[str, Tensor]:
            out = {**s, gain: torch.ones_like(s[gain])}
            return {**out, **{f"{r}.weight": s[f"{r}.weight"] * s[gain] for r in readers}}

        if readers and changes(work, absorbed, forward, batch) <= TOLERANCE:
            state = absorbed(state)
            work.load_state_dict(state, strict=False)
    given = tensors_of(model)
    return {k: v.to(given[k].dtype) for k, v in state.items()}


def find_streams(
    graph: NeuronGraph, model: nn.Module, forward: Forward, batch: Any, *, generator: Generator
) -> list[Stream]:
    """The spaces of a model, gains absorbed, that a random orthogonal map leaves the function of unchanged."""
    work = evaluating(copy.deepcopy(model)).double()
    state = tensors_of(work)
    found = []
    for space in graph.spaces:
        stream = _candidate(graph, space, state)
        if stream is None:
            continue
        q = random_orthogonal(space.size, generator)
        if changes(work, lambda s, c=stream, m=q: rotated(s, c, m), forward, batch) <= TOLERANCE:  # type: ignore[misc]
            found.append(stream)
    return found


def rotated(state: Mapping[str, Tensor], stream: Stream, q: Tensor) -> dict[str, Tensor]:
    """The state dict with the stream x replaced by Q x; q [size, size]."""
    out = dict(state)
    for tensor, axis in stream.axes:
        value = out[tensor]
        front = torch.tensordot(q.to(torch.float64), value.double(), dims=([1], [axis]))
        out[tensor] = front.movedim(0, axis).to(value.dtype)
    return out


def procrustes(graph: NeuronGraph, stream: Stream, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """The orthogonal Q, float64 [size, size], that maximises Σ ⟨A, Q B⟩ over the stream's tensors, each divided by its
    root mean square; the other spaces of B must be in A's order, or lie on none of the tensors (Schönemann 1966)."""
    total = torch.zeros(stream.size, stream.size, dtype=torch.float64)
    for axis in graph.by_id[stream.space].axes:
        if (axis.tensor, axis.axis) not in stream.axes:
            continue
        x, y = (rows(state[axis.tensor].double(), axis).double() for state in (a, b))
        scale = float(x.square().mean() + y.square().mean()) / 2
        total += x @ y.T / scale if scale > 0 else 0.0
    u, _, v = torch.linalg.svd(total)
    answer: Tensor = u @ v
    return answer


def aligned_orthogonally(
    graph: NeuronGraph, stream: Stream, a: Mapping[str, Tensor], b: Mapping[str, Tensor], *, generator: Generator
) -> dict[str, Tensor]:
    """B with its stream rotated and its other spaces permuted so as to lie on A: first Q from the tensors that no other
    space lies on (embeddings), then weight matching of the other spaces, then Q from all."""
    from mergeid.matchers.inner_products import WeightSimilarity
    from mergeid.matchers.weight import weight_matching

    alone = tuple(p for p in stream.axes if len({s.id for s, _ in graph.on_tensor[p[0]]}) == 1)
    state = dict(b)
    if alone:
        first = Stream(stream.space, stream.size, alone)
        state = rotated(state, stream, procrustes(graph, first, a, state))
    others = {s.id for s in graph.spaces if s.id != stream.space}
    element = weight_matching(WeightSimilarity(graph, a, state), generator=generator, only=others)
    state = graph.apply_state(element, state)
    return rotated(state, stream, procrustes(graph, stream, a, state))


def random_orthogonal(size: int, generator: Generator) -> Tensor:
    """float64 [size, size], uniform over the orthogonal group."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    answer: Tensor = q * r.diagonal().sign()
    return answer


def _candidate(graph: NeuronGraph, space: Space, state: Mapping[str, Tensor]) -> Stream | None:
    """A space that lies once on every axis; vectors of ones are gains that were absorbed."""
    if space.parents or space.blocks > 1 or graph.children(space):
        return None
    axes = []
    for axis in space.axes:
        value = state[axis.tensor]
        if axis.positions.size != value.shape[axis.axis] or axis.positions.shape[1] != 1:
            return None
        if value.dim() == 1 and bool((value == 1).all()):
            continue
        axes.append((axis.tensor, axis.axis))
    return Stream(space.id, space.size, tuple(axes)) if axes else None


def _readers(model: nn.Module, forward: Forward, batch: Any) -> dict[str, list[str]]:
    """Name of a norm -> linear layers whose input is its very output, or a view of it."""
    from torch.utils._pytree import tree_map

    made: list[tuple[str, Tensor]] = []
    readers: dict[str, list[str]] = {}
    handles = []

    def writes(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                made.append((name, output))

        return hook

    def reads(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            for norm, value in made:
                shared = args and isinstance(args[0], Tensor) and _storage(args[0]) == _storage(value)
                if shared and name not in readers[norm]:
                    readers[norm].append(name)

        return hook

    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if set(own) == {"weight"} and own["weight"].dim() == 1:
            readers[name] = []
            handles.append(module.register_forward_hook(writes(name)))
        elif isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(reads(name)))
    inputs = tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, batch)
    with listening(handles):
        forward(model, inputs)
    return readers


def _storage(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()
