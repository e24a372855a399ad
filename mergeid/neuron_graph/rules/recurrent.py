"""Recurrent layers that a kernel runs over all time steps at once, and sequences packed for them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mergeid.neuron_graph.combine import combine, elementwise
from mergeid.neuron_graph.layout import FROZEN, Fine, Layout, of_axes, take, view
from mergeid.neuron_graph.rules import rule

if TYPE_CHECKING:
    from mergeid.neuron_graph.call import Call

LSTM_GATES = 4


@rule("_pack_padded_sequence")
def pack(call: Call) -> list[Layout | None]:
    """[T, B, …] (or [B, T, …]) and lengths -> the steps that are there, [N, …]."""
    layout = call.freeze_dims(call.layout("input"), [0, 1])
    data = layout.with_dims((_frozen(call.outputs()[0].shape[0]), *layout.dims[2:]))
    return [replace(data, data=True), None]


@rule("_pad_packed_sequence")
def unpack(call: Call) -> list[Layout | None]:
    """[N, …] -> [T, B, …] (or [B, T, …]); what is filled in is the same number for every neuron."""
    layout = call.freeze_dims(call.layout("data"), [0])
    padded, lead = layout.dims[1:], call.outputs()[0].shape[:2]
    return [layout.with_dims((*(_frozen(n) for n in lead), *padded)), None]


def _frozen(n: int) -> tuple[Fine, ...]:
    return (Fine(n, FROZEN),) if n > 1 else ()


@rule("mkldnn_rnn_layer")
def lstm_layer(call: Call) -> list[Layout | None]:
    """One direction of one LSTM layer, input [T, B, I]: a cell has one row in each of the four gates, and all gates
    read the cells of the step before."""
    facts, why, size = call.facts, call.why, call["hidden_size"]
    cells = of_axes([facts.fresh([size])], [size])
    steps = call.freeze_dims(call.layout("input"), [0])
    read = combine(facts, [(steps, "tbi"), (call.layout("weight0"), "gi")], "tbg", why)
    again = combine(facts, [(cells, "h"), (call.layout("weight1"), "gh")], "g", why)
    biases = [call.layout(n) for n in ("weight2", "weight3")] if call["has_biases"] else []
    gates = elementwise(facts, [read, again, *biases], 3, why)
    gates = view(facts, gates, [*gates.shape[:2], LSTM_GATES, size], why)
    parts = [take(facts, gates, 2, np.array([k]), why) for k in range(LSTM_GATES)]
    parts = [p.with_dims((*p.dims[:2], p.dims[3])) for p in parts]
    states = [call.layout(n) for n in ("hx_", "cx_")]
    out = elementwise(facts, [*parts, cells, *states], 3, why)
    last = out.with_dims(out.dims[1:])
    return [out, last, last, None]
