"""Run a pair on a few inputs and put together everything that the predictor looks at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mergeid.basics.state import tensors_of
from mergeid.data.batches import input_dtype, to_model
from mergeid.errors import MergeidError
from mergeid.evidence.activations import real_tokens
from mergeid.models.examples import Examples
from mergeid.models.running import eval_mode, fits_the_model
from mergeid.plugins import Batch
from mergeid.prediction.features import (
    EndSums,
    Features,
    LayerDeviation,
    ShiftSums,
    depth_features,
    layer_deviations,
    output_features,
    weight_features,
)
from mergeid.prediction.lockstep import Deviation, Forward, activation_bytes, lockstep, watch
from mergeid.prediction.opinions import Opinions
from mergeid.prediction.trial import TogetherSums

EXAMPLES, SHARE, LEAST = 128, 4, 32
"""Both models are run on at most that many examples, evenly spaced, on every fourth where there are few, but on at
least `LEAST`: one example costs about as much as a dozen forward passes."""
BUDGET = 1 << 30
"""Bytes of activations that are held at once."""
COPIES = 4
"""How often the activations of one model are held: those of both models and what is made of them."""


@dataclass
class Evidence:
    """What was found under one assignment.

    Attributes:
        plain: features of the merge as averaging writes it. repaired: with statistics of normalisation estimated again;
            None where the models store none.
        layers: each layer's deviation, in order of execution.
        examples: how many inputs were run.
    """

    plain: Features
    repaired: Features | None
    layers: list[LayerDeviation]
    examples: int


@dataclass
class _Sums:
    plain: ShiftSums = field(default_factory=ShiftSums)
    fresh: ShiftSums | None = None
    deviations: list[Deviation] = field(default_factory=list)
    damping: list[float] | None = None

    def add(self, found: list[Deviation]) -> None:
        if not self.deviations:
            self.deviations = found
            return
        for total, one in zip(self.deviations, found, strict=True):
            for key in ("deviation", "difference", "chord", "own"):
                setattr(total, key, getattr(total, key) + getattr(one, key))


def probe(
    a: nn.Module,
    partners: Mapping[str, nn.Module],
    forward: Forward,
    examples: Examples,
    *,
    limit: int | None = None,
    ends: EndSums | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Evidence]:
    """Features of A with each of its partners.

    Args:
        a: with its own weights.
        partners: assignment ("direct", "matched") -> B with its neurons in that order.
        forward: (model, batch) -> logits [examples, …, classes].
        examples: labels are not looked at. What comes as whole inputs (`Examples.whole`) is run one by one, and the
            first dimension of its outputs counts as examples.
        limit: most examples; by default as `EXAMPLES` says.
        ends: what the models' own outputs say, if it is known of more examples than are run here.

    Raises:
        MergeidError: data that does not fit, outputs that are no logits.
        PathsDiffer: the models execute different operations.
    """
    count = len(examples)
    limit = limit or max(LEAST, min(EXAMPLES, count // SHARE))
    chosen = examples if count <= limit else examples.taken([k * count // limit for k in range(limit)])
    device = next((p.device for p in a.parameters()), torch.device("cpu"))

    def place(raw: Batch) -> Batch:
        return to_model(raw, device, input_dtype(a))

    first = place(chosen.batches(1)[0])
    with eval_mode(a), fits_the_model(first):
        size = together(a, forward, first)
    batches = chosen.batches(size)  # of like sizes: a small rest would have statistics of its own
    sums = {name: _Sums() for name in partners}
    known = ends is not None and ends.count > 0
    own = ends if ends is not None and known else EndSums()
    for k in range(len(batches)):
        if progress:
            progress(k, len(batches))
        batch = place(batches[k])
        with fits_the_model(batch), eval_mode(a):
            seen = watch(a, forward, batch)
            for name, b in partners.items():
                with eval_mode(b):
                    found = lockstep(a, b, forward, batch, seen_a=seen, damping=sums[name].damping)
                if not is_logits(found.a):
                    raise MergeidError(
                        f"the outputs of {type(a).__name__} have shape {list(found.a.shape)}, which are not class "
                        f"logits; a barrier in nats cannot be predicted for it"
                    )
                mask = real_tokens(batch)
                if not known and name == next(iter(partners)):
                    own.add(found.a, found.b, mask)
                sums[name].plain.add(found.a, found.b, found.middle, mask)
                if found.fresh is not None:
                    total = sums[name].fresh = sums[name].fresh or ShiftSums()
                    total.add(found.a, found.b, found.fresh, mask)
                sums[name].add(found.deviations)
                sums[name].damping = found.damping
    return {name: _evidence(a, partners[name], own.features(), s) for name, s in sums.items()}


def hears(*sums: EndSums | TogetherSums | Opinions) -> Callable[[Any, Any, Batch], None]:
    """Adds both models' outputs on a batch, where they are logits."""

    def add(a: Any, b: Any, batch: Batch) -> None:
        if comparable(a, b):
            for each in sums:
                each.add(a, b, real_tokens(batch))

    return add


def comparable(a: Any, b: Any) -> bool:
    """Whether both are logits, of as many classes: heads that the user leaves out of the merge may have others."""
    return is_logits(a) and is_logits(b) and a.shape == b.shape


def is_logits(out: Any) -> bool:
    return isinstance(out, Tensor) and out.dim() > 1 and out.shape[-1] > 1 and out.is_floating_point()


def _evidence(a: nn.Module, b: nn.Module, ends: Features, sums: _Sums) -> Evidence:
    layers = layer_deviations(sums.deviations)
    common = {**depth_features(layers), **weight_features(tensors_of(a), tensors_of(b))}
    plain = {**output_features(ends, sums.plain.features()), **common}
    fresh = None if sums.fresh is None else {**output_features(ends, sums.fresh.features()), **common}
    return Evidence(plain, fresh, layers, sums.plain.count)


def together(model: nn.Module, forward: Forward, example: Batch) -> int:
    """How many examples are run at once.

    Args:
        example: a batch of one."""
    return max(1, BUDGET // max(COPIES * activation_bytes(model, forward, example), 1))
