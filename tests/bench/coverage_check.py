"""One model, checked: is its neuron graph found, does it hold before anything is bisected, and what is frozen?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mergeid.neuron_graph.neuron_graph import NeuronGraph
from mergeid.neuron_graph.trace import trace
from mergeid.neuron_graph.verify import verify

Batch = dict[str, Any]
FLOAT32_PARAMETERS = 400_000_000
"""Above this size a float64 copy does not fit beside the model."""


@dataclass
class Case:
    """A model to check.

    Attributes:
        model: in eval mode, random weights.
        inputs: the batch that traces it.
        forward: ``forward(model, batch)`` returns the task output, whose neurons are frozen.
        another: ``another(generator, batch_size)`` draws other inputs, of another batch size.
        note: what a reader of the table must know (a smaller config than the name's own, say).
    """

    model: nn.Module
    inputs: Batch
    forward: Callable[[nn.Module, Batch], Any]
    another: Callable[[torch.Generator, int], Batch]
    note: str = ""
    label: Callable[[list[tuple[str, int]]], str | None] | None = field(default=None)


def check(case: Case, seed: int = 0) -> dict[str, Any]:
    """A row of the table: figures of the graph as traced, and the errors of two verifications of it.

    Times are seconds of one core, so that other work on the machine does not count. The second verification takes
    another seed, other inputs and a larger batch. ``failed`` names the spaces that either would have to freeze: none in
    a graph that is right.
    """
    model = case.model.eval()
    parameters = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        began = time.process_time()
        case.forward(model, case.inputs)
        forward = time.process_time() - began
    began = time.process_time()
    graph = trace(model, case.inputs, lambda: case.forward(model, case.inputs), label=case.label)
    seconds = max(time.process_time() - began - forward, 0.0)
    row = {**described(graph, parameters, seconds, forward), "note": case.note}
    for size in (1, 2):  # outputs that compare examples with each other say nothing of one
        batch = case.another(_seeded(seed + 3), size)
        first = verify(graph, model, batch, case.forward, generator=_seeded(seed), dtype=_dtype(parameters))
        if first.graph.spaces or not graph.spaces:
            break
    row["verified"] = int(not first.failed)
    row["error"], row["dtype"] = f"{first.error:.1e}", (first.graph.verified or {})["dtype"]
    if not first.failed:
        second = verify(
            graph,
            model,
            case.another(_seeded(seed + 1), 2),
            case.forward,
            generator=_seeded(seed + 2),
            samples=1,
            dtype=_dtype(parameters),
        )
        row["held_again"], row["error_again"] = int(not second.failed), f"{second.error:.1e}"
        first = second if second.failed else first
    row["failed"] = " ".join(first.failed)
    if noise := (first.graph.verified or {}).get("noise"):
        row["note"] = "; ".join(x for x in (case.note, f"rounding noise: {', '.join(noise)}") if x)
    return row


def described(graph: NeuronGraph, parameters: int, seconds: float, forward: float) -> dict[str, Any]:
    """What a row says of the graph."""
    return {
        "traced": 1,
        "parameters": parameters,
        "spaces": len(graph.spaces),
        "share": round(graph.share, 6),
        "seconds": round(seconds, 3),
        "forward": round(forward, 3),
        "frozen_by": main_reason(graph),
        "unknown_ops": " ".join(sorted(graph.unknown_ops)),
    }


def main_reason(graph: NeuronGraph) -> str:
    """Why most of the parameters that are not free are frozen: the reason on the axes of the largest such tensors."""
    lost: dict[str, float] = {}
    for tensor, axis, why in graph.frozen:
        shape = graph.tensors[tensor]
        stuck = (1 - graph.free_share(tensor)) * torch.Size(shape).numel()
        if stuck:
            text = f"{why} ({tensor}[{axis}])"
            lost[text] = lost.get(text, 0.0) + stuck
    return max(lost, key=lambda k: lost[k]) if lost else ""


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _dtype(parameters: int) -> torch.dtype:
    return torch.float64 if parameters < FLOAT32_PARAMETERS else torch.float32
