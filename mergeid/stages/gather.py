"""Gather: both models run over the calibration examples, and what their activations say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from mergeid.basics.memory import SMALL_NETWORK, give_back
from mergeid.basics.on_demand import is_on_demand
from mergeid.data.batches import MadeBatches, input_dtype, to_model
from mergeid.evidence.activations import PairStream, TapReader
from mergeid.evidence.evidence import ActivationEvidence
from mergeid.evidence.taps import choose_taps
from mergeid.models.examples import Examples
from mergeid.models.loaded import Loaded
from mergeid.models.running import fits_the_model
from mergeid.neuron_graph.neuron_graph import TapMap
from mergeid.plugins import Batch
from mergeid.request.request import Run
from mergeid.stages.open import Pair

Batches = Callable[[], MadeBatches]
"""Starts a pass over the calibration examples."""
Hears = Callable[[Any, Any, Batch], None]
"""Outputs of A and of B, and the batch that they are of."""

WIDE, ROWS = 2048, 8192
"""Neurons of a space from which on sums over pairs of them are dear, and rows that are then enough: with half of them a
correlation's standard error is below 0.016."""
POSITIONS, LEAST_POSITIONS = 32, 8
"""Of an example: at most, and at least where there are many examples of a wide network."""
GIVEN_BACK = 2
"""Batches of a large network after which freed memory goes back: after each it would take longer."""
HEARD = 16
"""Examples in a batch of large models whose outputs are listened to: these are large as well."""


def passes(a: Loaded, examples: Examples, run: Run) -> Batches:
    """Starts passes over the examples, without labels, on the device that A lies on."""
    device = next((p.device for p in a.model.parameters()), torch.device("cpu"))

    kind = input_dtype(a.model)
    found, large = examples.batches(run.batch_size), sum(p.numel() for p in a.model.parameters()) > SMALL_NETWORK

    def made(i: int, batch: Batch) -> Batch:
        run.tell("calibration", i, len(found))
        if large and i % GIVEN_BACK == 0:
            give_back()  # else blocks of all sizes come to lie between those that are kept
        return to_model(a.inputs_of(batch), device, kind)

    return lambda: MadeBatches(found, made)


def in_its_own_format(b: Loaded, a: Loaded) -> Callable[[torch.nn.Module, Any], Any]:
    """B's forward pass on batches in A's number format."""
    kind = input_dtype(b.model)
    if kind == input_dtype(a.model):
        return b.forward

    def forward(model: torch.nn.Module, batch: Any) -> Any:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        return b.forward(model, to_model(batch, device, kind))

    return forward


def _in_a_sentence(run: Callable[[torch.nn.Module, Any], Any]) -> Callable[[torch.nn.Module, Any], Any]:
    """A forward pass that says what it does not take."""

    def forward(model: torch.nn.Module, batch: Any) -> Any:
        with fits_the_model(batch):
            return run(model, batch)

    return forward


def rows_of_each(taps: Mapping[str, Sequence[TapMap]], examples: int) -> int:
    """Most positions of an example that count as rows."""
    widest = max((int((t.index >= 0).sum()) for list_of in taps.values() for t in list_of), default=0)
    if widest <= WIDE:
        return POSITIONS
    return min(POSITIONS, max(LEAST_POSITIONS, ROWS // max(examples, 1)))


def evidence_of(
    pair: Pair, examples: Examples, run: Run, *, judged: bool = True, hears: Hears | None = None
) -> ActivationEvidence:
    """Activations of both models, collected in one pass.

    Args:
        judged: of the half too that decisions are judged on.
        hears: takes both models' outputs on every batch that is run.
    """
    a, b = pair.a, pair.b
    if hears is not None and is_on_demand(a.model):
        run = replace(run, batch_size=min(run.batch_size, HEARD))
    taps = choose_taps(pair.graph, a.model)
    flat = [t for list_of in taps.values() for t in list_of]
    said_by_a, said_by_b = _in_a_sentence(a.forward), _in_a_sentence(in_its_own_format(b, a))
    forward_a, forward_b = said_by_a, said_by_b
    if hears is not None:
        kept: list[Any] = []

        def forward_a(model: torch.nn.Module, batch: Any) -> Any:
            kept[:] = [said_by_a(model, batch)]
            return kept[0]

        def forward_b(model: torch.nn.Module, batch: Any) -> Any:
            out = said_by_b(model, batch)
            hears(kept.pop(), out, batch)
            return out

    stops = hears is None  # a wide head takes long, and its logits are large
    reader_a, reader_b = (TapReader(x.model, f, flat, stops=stops) for x, f in ((a, forward_a), (b, forward_b)))
    batches = passes(a, examples, run)
    most = rows_of_each(taps, len(examples))
    stream = PairStream(reader_a, reader_b, batches, examples.whole, most, run.seed, len(examples))
    evidence = ActivationEvidence(pair.graph, stream, taps)
    evidence.collect(judged=judged)
    return evidence
