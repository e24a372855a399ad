"""Make every merge of a pair in memory and run it on calibration inputs: the mode --try of a prediction.

It is no prediction: networks between the two are run. Labels are not needed; where the examples have some, they are
counted by themselves. A repair is made on every second input and tried on the others, so that it is not judged by what
it was fitted to.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mergeid.basics.shelf import Shelf
from mergeid.basics.state import load_weights
from mergeid.data.batches import input_dtype, to_model
from mergeid.errors import MergeidError
from mergeid.evidence.activations import real_tokens
from mergeid.models.loaded import class_loss
from mergeid.models.running import eval_mode, fits_the_model
from mergeid.plugins import LossParts
from mergeid.prediction.labels import Measured, corrected
from mergeid.prediction.trial import TrialSums
from mergeid.results.comparison import MATCHED, PLAIN
from mergeid.results.trial import Labelled, Trial
from mergeid.stages.compare import merges_of
from mergeid.stages.members import averaged_pair
from mergeid.stages.regressed import can_be_regressed
from mergeid.stages.repair import LEANING, REGMEAN, SOLVE, repair_network, repairs
from mergeid.stages.solving import LEAST, LEFT, can_be_solved

if TYPE_CHECKING:
    from mergeid.models.examples import Examples
    from mergeid.models.loaded import Loaded
    from mergeid.plugins import Batch
    from mergeid.prediction.model import Interval
    from mergeid.request.request import Run
    from mergeid.results.plan import Plan
    from mergeid.results.prediction import TrialReader
    from mergeid.stages.open import Pair

EXAMPLES = 512
"""Calibration inputs that a trial takes, evenly spaced."""


@dataclass(frozen=True)
class Said:
    """What networks said of one batch: their logits, the positions that count, and how much each lost by its labels."""

    logits: Tensor
    mask: Tensor | None
    lost: LossParts | None


def trials_of(
    pair: Pair, plan: Plan, examples: Examples, run: Run, *, skip: Sequence[str] = (), reader: TrialReader | None = None
) -> list[Trial]:
    """Every merge that the pair has, the simplest first.

    Args:
        plan: with every space matched. reader: says what is expected on other inputs.

    Raises:
        MergeidError: outputs that are no logits."""
    count = len(examples)
    kept = examples.taken([k * count // min(count, EXAMPLES) for k in range(min(count, EXAMPLES))])
    halves = [kept.taken(range(k, len(kept), 2)) for k in range(2)]
    members = averaged_pair(pair.a, pair.b, plan, halves[0])
    merges = {k: m for k, m in merges_of(members)[1].items() if k in (PLAIN, MATCHED)}
    kinds = [k for k in repairs(members, "auto", run.place) if k != "repair"]
    shelf = Shelf()
    own = [
        [replace(said, logits=shelf.take(said.logits)) for said in _said(pair.a, m.model, halves[1], run)]
        for m in (pair.a, pair.b)
    ]
    classes = [said[0].logits.shape[-1] for said in own]
    if classes[0] != classes[1]:
        raise MergeidError(
            f"--try compares merges with what both models say, and {pair.a.source} has {classes[0]} classes and "
            f"{pair.b.source} {classes[1]}; leave it out"
        )
    net, found = copy.deepcopy(pair.a.model).to(run.place), []
    work = [(name, kind) for kind in kinds for name in merges]
    for k, (name, kind) in enumerate(work):
        run.tell("trying merges", k, len(work) + 1)
        load_weights(net, merges[name].merged_state(skip))
        if kind != "none":
            repair_network(merges[name], net, mode=kind, skip=skip, device=run.place)
        found.append(_trial(name, kind, own, _said(pair.a, net, halves[1], run), reader))
    if can_be_solved(members) and len(halves[0]) >= LEAST:
        run.tell("trying a solved merge", len(work), len(work) + 1)
        best = min(found, key=lambda t: t.soft).merge
        for kind in (*([REGMEAN] if can_be_regressed(merges[best]) else []), SOLVE, LEANING):
            if kind == LEANING and not (found[-1].repair == SOLVE and found[-1].soft > LEFT):
                continue  # as the last look of a merge
            load_weights(net, merges[best].merged_state(skip))
            try:
                repair_network(merges[best], net, mode=kind, skip=skip, device=run.place)
                found.append(_trial(best, kind, own, _said(pair.a, net, halves[1], run), reader))
            except MergeidError:  # what cannot be solved has no trial
                pass
    return found


def _said(first: Loaded, net: nn.Module, examples: Examples, run: Run) -> Iterator[Said]:
    device = torch.device(run.place)
    net = net.to(device)
    for raw in examples.batches(run.batch_size):
        batch = to_model(raw, device, input_dtype(net))
        inputs = first.inputs_of(batch)
        with torch.no_grad(), eval_mode(net), fits_the_model(inputs):
            out = first.forward(net, inputs)
        if not (isinstance(out, Tensor) and out.dim() > 1 and out.shape[-1] > 1):
            raise MergeidError("the outputs are not class logits; a trial cannot say how many nats are lost")
        yield Said(out, real_tokens(batch), _lost(first, out, batch))


def _lost(first: Loaded, out: Tensor, batch: Batch) -> LossParts | None:
    """One entry per example, by the labels of the batch; None where it has none that the outputs are of."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return None
    parts = first.loss(out, batch)
    return class_loss(out, labels) if parts is None else parts


@dataclass
class _Labels:
    """Per example: excess of the loss and shortfall of right predictions, each over the scored predictions, and what B
    loses beyond A."""

    excess: list[Tensor] = field(default_factory=list)
    missed: list[Tensor] = field(default_factory=list)
    behind: list[Tensor] = field(default_factory=list)

    def add(self, a: LossParts, b: LossParts, merged: LossParts) -> None:
        scored = a.count > 0
        mean = [(m - (x + y) / 2)[scored].double() / a.count[scored]
                for m, x, y in ((merged.loss, a.loss, b.loss), (merged.correct, a.correct, b.correct))]  # fmt: skip
        self.excess.append(mean[0].cpu())
        self.missed.append(-mean[1].cpu())
        self.behind.append(((b.loss - a.loss)[scored].double() / a.count[scored]).cpu())

    def found(self, expected: Interval | None, most: float) -> Labelled | None:
        rows = torch.cat(self.excess) if self.excess else torch.zeros(0)
        if len(rows) < 2:
            return None
        seen = Measured(float(rows.mean()), float(rows.std()) / len(rows) ** 0.5, len(rows))
        nats = None if expected is None or not expected.trusted else expected
        ends = (0.0, float("-inf"), float("inf")) if nats is None else (nats.expected, nats.low, nats.high)
        both = corrected(seen, *ends, most=most)
        points, behind = 100 * float(torch.cat(self.missed).mean()), float(torch.cat(self.behind).mean())
        own = seen.mean, *seen.interval()
        return Labelled(*own, both.expected, both.low, both.high, points or None, len(rows), behind)


def _trial(
    name: str, kind: str, own: Sequence[Sequence[Said]], said: Iterable[Said], reader: TrialReader | None
) -> Trial:
    sums, labels = TrialSums(), _Labels()
    for a, b, merged in zip(*own, said, strict=True):
        sums.add(a.logits, b.logits, merged.logits, a.mask)
        if a.lost is not None and b.lost is not None and merged.lost is not None:
            labels.add(a.lost, b.lost, merged.lost)
    classes = (own[0][0].logits > -math.inf).flatten(0, -2).any(0).sum()  # the others are ruled out
    found, most = sums.features(), math.log(max(int(classes), 2))
    hard, soft, missed = found["hard"], found["soft"], found["missed"]
    trial = Trial(name, kind, hard, soft, missed, sums.count, beyond=found["beyond"], sharp=found["sharp"])
    if reader is None:
        return replace(trial, labelled=labels.found(None, most))
    trial = replace(trial, nats=reader.nats(trial))
    return replace(trial, labelled=labels.found(reader.before_labels(trial), most))
