"""The chord deviation of the layers that consume a space, to first order, without running an interpolated network.

At the midpoint a linear layer sees the weights (W_a + W_b)/2 and, to first order, the inputs (h_a + h_b)/2. Its
pre-activation then misses the chord, the mean of the two networks' pre-activations, by

    xi = 1/4 (W_a - W_b)(h_b - h_a),

with B under the assignment. It vanishes where the aligned activations (or the aligned weights) agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mergeid.neuron_graph.neuron_graph import AxisMap, NeuronGraph, TapMap

ROWS = 256
"""Held-out activations that are kept per space."""


@dataclass
class Consumer:
    """A layer with weights on the space, and activations of both models at its input (float32 [rows, positions])."""

    tap: TapMap
    axis: AxisMap
    a: list[Tensor] = field(default_factory=list)
    b: list[Tensor] = field(default_factory=list)
    rows: int = 0

    def add(self, a: Tensor, b: Tensor) -> None:
        """Keep rows until there are enough, a few of every batch."""
        take = min(len(a), 32, ROWS - self.rows)
        if take > 0:
            at = torch.linspace(0, len(a) - 1, take).long()
            self.a.append(a[at].clone())
            self.b.append(b[at].clone())
            self.rows += take


def find_consumer(graph: NeuronGraph, space: str, taps: Sequence[TapMap]) -> tuple[int, Consumer] | None:
    """The first tap that is the input of a layer whose weight has the same neurons in the same order on one axis."""
    for k, tap in enumerate(taps):
        if tap.kind != "in":
            continue
        for axis in graph.by_id[space].axes:
            whole = graph.tensors[axis.tensor]
            if axis.tensor == f"{tap.module}.weight" and len(whole) >= 2 and np.array_equal(axis.index, tap.index):
                return k, Consumer(tap, axis)
    return None


def chord_deviation(
    graph: NeuronGraph,
    consumer: Consumer,
    weight_a: Tensor,
    weight_b: Tensor,
    element: Mapping[str, np.ndarray],
    positions: np.ndarray,
) -> float | None:
    """RMS of xi over the RMS of the chord about its mean, at one layer.

    Args:
        weight_a, weight_b: the layer's weight in both models; kernels count place by place, as if the activations of
            neighbouring places were uncorrelated.
        element: the assignment of B, this space included.
        positions: where `element` takes each position of B's activations from.
    """
    if consumer.rows < 2:
        return None
    axis = consumer.axis
    ours, theirs = weight_a, graph.apply(element, axis.tensor, weight_b)
    if ours.is_complex():
        ours, theirs = torch.view_as_real(ours), torch.view_as_real(theirs)
    wa, wb = (w.float().movedim(axis.axis, -1) for w in (ours, theirs))
    wa, wb = (w.reshape(-1, w.shape[-1]).cpu() for w in (wa, wb))
    present = torch.from_numpy(np.flatnonzero(axis.index >= 0))
    wa, wb = wa[:, present], wb[:, present]
    ha, hb = torch.cat(consumer.a), torch.cat(consumer.b)[:, torch.from_numpy(positions)]
    xi = (hb - ha) @ (wa - wb).T / 4
    chord = (ha @ wa.T + hb @ wb.T) / 2
    scale = (chord - chord.mean(0)).square().mean(dtype=torch.float64)
    return float((xi.square().mean(dtype=torch.float64) / scale).sqrt()) if scale > 0 else None
