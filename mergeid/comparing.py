"""The last look before a merge is written: is what the plan chose really nearest to the models?

A plan judges neurons space by space, and what it cannot see (statistics of BatchNorm layers that are not estimated
again, errors that add up over depth) can still make its merge the worse one. Up to three merges are at hand: the plain
one, the one that is planned, and the one with every space matched. They are run on calibration inputs, without labels,
and compared with what the models themselves say; the nearest is written, and ties (`TIE`) stay with the plan.

Models with a classifying head: with H_i the cross-entropy of the merge against model i's prediction and s_i the model's
share, an input (or token) counts -log Σ s_i exp(-H_i). That is the likelihood of a mixture: one of the models is right
about this input, and its share is how likely that is beforehand. Where the models agree it is the cross-entropy against
their mean prediction. Where they do not (fine-tunes on different tasks), that would reward a merge that lies between
them and is right about neither; this asks that the merge keeps to either. Other models: the squared distance from
their mean output.

Cost: every model and every merge runs on `EXAMPLES` inputs, and every merge is a network in memory meanwhile.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite, sqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from mergeid.evaluate.batches import FixedBatches, input_dtype, to_model
from mergeid.graph.group import same_element
from mergeid.members import Member, Members
from mergeid.memory import few_rows
from mergeid.state import load_weights

if TYPE_CHECKING:
    from mergeid.graph.neuron_graph import Element
    from mergeid.load import Loaded
    from mergeid.planning import Plan
    from mergeid.plugins import Batch
    from mergeid.repairing import Repair

EXAMPLES = 256
"""Calibration examples that are compared, evenly spaced."""
TIE = 1e-3
"""Nats (or share of the outputs' variance) that another merge must be nearer by than the planned one. Merges that
differ in dead or equal neurons only are equal, up to rounding."""
PLAIN, MIXED, MATCHED = "plain", "mixed", "matched"
"""The merges: nothing moved, some spaces matched, every space matched."""


@dataclass(frozen=True)
class Comparison:
    """Attributes:
    distances: merge -> mean over the examples, lower is nearer to the models.
    planned: the merge that the plan chose; chosen: the one to write.
    unit: "nats" (cross-entropy) or "relative" (squared distance over the mean output's variance).
    examples: how many were compared.
    error: standard error of the difference of the planned and the chosen merge's distances; None where they are one
        merge, or it is not known.
    """

    distances: dict[str, float]
    planned: str
    chosen: str
    unit: str
    examples: int
    error: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The attributes; a distance that is not finite, which JSON has no number for, is None."""
        return {**self.__dict__, "distances": {k: v if isfinite(v) else None for k, v in self.distances.items()}}

    @property
    def note(self) -> str | None:
        """What the user is told where the plan is not followed."""
        if self.chosen == self.planned:
            return None
        what = "nats from the models' predictions" if self.unit == "nats" else "of the outputs' variance"
        if self.error is not None:
            what += f", a difference of {abs(self.distances[self.planned] - self.distances[self.chosen]):.2g} with a "
            what += f"standard error of {self.error:.2g}"
        own, other = self.distances[self.planned], self.distances[self.chosen]
        if self.chosen == PLAIN:
            said = f"matching was not used: on {self.examples} calibration examples the matched merge is further from "
            return f"{said}the models than the plain one ({_shown(own)} to {_shown(other)} {what})"
        said = f"every space was matched: on {self.examples} calibration examples that merge is nearer to the models "
        return f"{said}than the planned one ({_shown(other)} to {_shown(own)} {what})"


@dataclass(frozen=True)
class Merge:
    """One of the merges that could be written.

    Attributes:
        name: "plain", "mixed" or "matched".
        repair: of the merged network, as it would be written.
    """

    name: str
    members: Members
    repair: Repair


def last_look(
    members: Members,
    repaired: Callable[[Members], Repair],
    *,
    skip: Sequence[str] = (),
    batch_size: int,
    device: str,
) -> tuple[Merge, Comparison | None]:
    """The merge to write, and the comparison that it comes from; None where there was nothing to compare.

    Args:
        members: the models with their plans and calibration data.
        repaired: the repair of a merge.
        skip: globs of tensor names that are not merged.
    """
    planned, merges = _merges(members)
    if len(merges) == 1:
        return Merge(planned, members, repaired(members)), None
    made = {name: Merge(name, of, repaired(of)) for name, of in merges.items()}
    nets = {
        name: _network(members.first.model, {**m.members.merged_state(skip), **m.repair.tensors}, device)
        for name, m in made.items()
    }
    found = compare(members, nets, planned, batch_size=batch_size, device=device)
    return made[found.chosen], found


def _merges(members: Members) -> tuple[str, dict[str, Members]]:
    """The planned merge's name, and the merges that differ."""
    plans = [m.plan for m in _all(members) if m.plan is not None]
    full = all(same_element(plan.element, _full(plan)) for plan in plans)
    if not any(plan.moves for plan in plans):
        return PLAIN, {PLAIN: members, **({} if full else {MATCHED: _under(members, _full)})}
    plain = {PLAIN: _under(members, lambda plan: plan.graph.identity())}
    if full:
        return MATCHED, {**plain, MATCHED: members}
    return MIXED, {**plain, MIXED: members, MATCHED: _under(members, _full)}


def _all(members: Members) -> list[Member]:
    return [*members.models, *([] if members.base is None else [members.base])]


def _full(plan: Plan) -> Element:
    return plan.element if plan.matched is None else plan.matched


def _under(members: Members, element: Callable[[Plan], Element]) -> Members:
    """The same models, each under another element."""

    def other(member: Member) -> Member:
        made = member.plan
        return member if made is None else replace(member, plan=replace(made, element=element(made)))

    base = None if members.base is None else other(members.base)
    return replace(members, models=[other(m) for m in members.models], base=base)


def compare(
    members: Members, nets: Mapping[str, nn.Module], planned: str, *, batch_size: int, device: str
) -> Comparison:
    """Run merged networks and the models on calibration inputs.

    Args:
        members: the models with their calibration data.
        nets: merged networks by name, on the device, repaired as they would be written.
        planned: the one to prefer.
    """
    found, unit = distances(
        members.first,
        [m.loaded.model for m in members.models],
        list(nets.values()),
        shares=_shares(members),
        either=True,
        dataset=members.dataset,
        collate=members.collate,
        batch_size=batch_size,
        device=device,
    )
    scores = dict(zip(nets, found, strict=True))
    means = {name: float(score.mean()) for name, score in scores.items()}
    chosen = min(means, key=lambda name: _or_far(means[name]))
    # what is not finite in the planned merge alone speaks against it
    if not _or_far(means[planned]) - _or_far(means[chosen]) > TIE:
        chosen = planned
    gap = scores[planned] - scores[chosen]
    error = float(gap.std()) / sqrt(len(gap)) if chosen != planned and len(gap) > 1 else inf
    return Comparison(means, planned, chosen, unit, found.shape[1], error if isfinite(error) else None)


def _shown(distance: float) -> str:
    """With the decimals that `TIE` tells apart."""
    return f"{distance:.3f}" if abs(distance) < 1e4 else f"{distance:.3g}"


def _or_far(mean: float) -> float:
    return mean if isfinite(mean) else inf


def distances(
    first: Loaded,
    models: Sequence[nn.Module],
    nets: Sequence[nn.Module],
    *,
    shares: Sequence[float],
    either: bool,
    dataset: Any,
    collate: Callable[[Any], Any] | None,
    batch_size: int,
    device: str,
) -> tuple[Tensor, str]:
    """How far merged networks are from what the models say.

    Args:
        first: of the models, how they are run.
        models: the networks that were merged; shares: their weights in the mixture (or mean) of what they say, which
            sum to 1.
        either: take classifiers' predictions as a mixture, of which a merge may keep to any; else their mean.
        nets: merged networks, on the device, repaired as they would be written.
        dataset: of which up to `EXAMPLES`, evenly spaced, are looked at, without labels.

    Returns:
        float64 [nets, examples], and the unit as in `Comparison`.
    """
    models = [m.to(device).eval() for m in models]
    classifies = _classifies(first)
    scores: list[Tensor] = []
    count = len(dataset)
    chosen = dataset
    if count > EXAMPLES:
        chosen = Subset(chosen, [k * count // EXAMPLES for k in range(EXAMPLES)])
    spread = torch.zeros(3, dtype=torch.float64)
    for raw in FixedBatches(chosen, batch_size, collate):
        batch = to_model(raw, torch.device(device), input_dtype(first.model))
        with torch.no_grad():
            own = [first.forward(m, batch) for m in models]
            if classifies:
                far = _cross_entropies(own, [first.forward(net, batch) for net in nets], shares, either)
            else:
                middle = sum((w * o.double() for w, o in zip(shares, own, strict=True)), torch.zeros(()))
                spread += torch.tensor([middle.numel(), float(middle.sum()), float(middle.square().sum())])
                far = [(first.forward(net, batch).double() - middle).square().mean(-1) for net in nets]
            rows = [_per_example(f, batch) for f in far]
        scores.append(torch.stack(rows).cpu())
    found = torch.cat(scores, 1)
    if not classifies:
        n, total, squares = spread.tolist()
        found = found / max(squares / n - (total / n) ** 2, 1e-300)
    return found, "nats" if classifies else "relative"


def _cross_entropies(
    own: Sequence[Tensor], outs: Sequence[Tensor], shares: Sequence[float], either: bool
) -> Sequence[Tensor]:
    """For every network's logits [..., classes] how far they are from what the models say, float64 [...], a few rows
    at a time: -log Σ s_i exp(-H_i), or the cross-entropy against the mean prediction.

    Models that are subtracted (a negative share) are not right about anything."""
    weights = torch.tensor(shares, dtype=torch.float64, device=outs[0].device)
    likely = (weights.clamp(min=0) / weights.clamp(min=0).sum()).log()
    found = []
    for parts in few_rows(*own, *outs):
        said = torch.stack([p.softmax(-1) for p in parts[: len(own)]])
        if not either:
            said = torch.einsum("m,mrc->rc", weights, said)[None]
        far = []
        for out in parts[len(own) :]:
            # classes that nobody names count nothing, be they ruled out (a logit of -inf) or not
            against = (said * out.log_softmax(-1)).masked_fill(said == 0, 0.0).sum(-1)
            far.append(-torch.logsumexp(against + likely[:, None], 0) if either else -against[0])
        found.append(torch.stack(far))
    return [f.reshape(outs[0].shape[:-1]) for f in torch.cat(found, 1)]


def _network(model: nn.Module, state: Mapping[str, Tensor], device: str) -> nn.Module:
    net = copy.deepcopy(model).to(device)
    load_weights(net, state)
    return net


def _shares(members: Members) -> list[float]:
    """Weights of the models in what they say together: those of the merge where they are shares, else equal ones."""
    count = len(members.models)
    plain = [float(w) for w in members.settings.weights if isinstance(w, (int, float))]
    if members.settings.method.weights == "shares" and len(plain) == count and sum(plain) > 0:
        return [w / sum(plain) for w in plain]
    return [1 / count] * count


def _classifies(first: Any) -> bool:
    """Whether the last dimension of the output holds logits: the adapter can score it against labels."""
    example = first.example
    if "labels" not in example:
        return False
    with torch.no_grad():
        inputs = {k: v for k, v in example.items() if k != "labels"}
        device = next(first.model.parameters()).device
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in example.items()}
        out = first.forward(first.model, {k: moved[k] for k in inputs})
        return first.adapter.loss(first.arch, out, moved) is not None


def _per_example(scores: Tensor, batch: Batch) -> Tensor:
    """Mean over the tokens of an example, without padding."""
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == scores.shape:
        return (scores * mask).sum(1) / mask.sum(1).clamp(min=1)
    return scores.reshape(len(scores), -1).mean(1)
