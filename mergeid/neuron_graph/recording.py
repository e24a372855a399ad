"""Run the forward passes of a model under a `Recorder`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mergeid.basics.nested import named_tensors
from mergeid.basics.state import uncompiled
from mergeid.errors import MergeidError
from mergeid.neuron_graph.leaving import Leaving
from mergeid.neuron_graph.recorder import Recorder


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    Attributes:
        inputs: every tensor in this nest is an input: frozen in all dimensions.
        forward: returns all outputs that a caller reads; all labels on them are frozen.
        values: for inputs on the meta device, the same nest with real tensors.
    """

    inputs: Any
    forward: Callable[[], Any]
    values: Any = None


def record(model: nn.Module, state: Mapping[str, Tensor], passes: Sequence[Pass]) -> Recorder:
    """Run every pass once, one after the other, and return what was seen in all of them.

    Activations are tapped in the first pass alone.

    Args:
        model: the module that the passes call, in eval mode.
        state: its state dict with the live tensors (``keep_vars=True``).
    """
    recorder = Recorder()
    recorder.add_parameters(state)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for one in passes:
            _run(recorder, model, one)
            recorder.tapping = False
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    _freeze_unread(recorder, model)
    return recorder


def _run(recorder: Recorder, model: nn.Module, one: Pass) -> None:
    inputs = named_tensors(one.inputs)
    if one.values is not None:
        for name, value in named_tensors(one.values).items():
            recorder.shadows.add(inputs[name], value)
    for tensor in inputs.values():
        recorder.add_input(tensor)
    seen = Leaving(recorder.leaves, recorder.assigned)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), uncompiled(), recorder.watching(model), recorder, seen:
        output = one.forward()
    recorder.use(named_tensors(output).values())
    for tensor in named_tensors(output).values():
        recorder.facts.freeze(recorder.layout(tensor).all_labels, "model output")


def _freeze_unread(recorder: Recorder, model: nn.Module) -> None:
    """Rows of a table that this input never reached (positions beyond its length) may matter to another input."""
    read = recorder.facts.read()
    several = [labels for labels in recorder.axes.values() if len(labels) > 1]
    if several and not any(read[labels].any() for labels in several):
        raise MergeidError(
            f"the forward pass of {type(model).__name__} on the example inputs used none of its {len(recorder.axes)} "
            "weights; give inputs that run through it, and a model that uses its own tensors"
        )
    for labels in several:  # an axis of size 1 has nothing to be told apart from
        recorder.facts.freeze(labels[~read[labels]], "never read by the traced forward pass")
