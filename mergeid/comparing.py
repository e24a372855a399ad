"""The last word before a matched merge is written: does it really stay nearer to the models than a plain one?

A plan judges neurons space by space, and what it cannot see (statistics of BatchNorm layers that are not estimated
again, errors that add up over depth) can still make the matched merge the worse one. Both merges are at hand here, so
both are run on calibration inputs, without labels, and compared with what the models themselves say: the cross-entropy
against their mean prediction, for models with a classifying head, else the squared distance from their mean output.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from mergeid.evaluate.batches import FixedBatches, input_dtype, to_model
from mergeid.members import Member, Members
from mergeid.state import load_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mergeid.load import Loaded
    from mergeid.plugins import Batch

EXAMPLES = 256
"""Calibration examples that are compared, evenly spaced."""
SIGMAS = 1.96


@dataclass(frozen=True)
class Comparison:
    """Attributes:
    direct, matched: mean over the examples, lower is nearer to the models.
    unit: "nats" (cross-entropy) or "relative" (squared distance over the mean output's variance).
    examples: how many were compared.
    worse: whether the matched merge is further away by more than the 95 % interval of the paired difference.
    """

    direct: float
    matched: float
    unit: str
    examples: int
    worse: bool

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)

    @property
    def note(self) -> str:
        """What the user is told where the matched merge is worse."""
        what = "nats against the models' mean prediction" if self.unit == "nats" else "of the outputs' variance"
        return (
            f"matching was not used: on {self.examples} calibration examples the matched merge is further from the "
            f"models than the plain one ({self.matched:.3g} to {self.direct:.3g} {what})"
        )


def unmatched(members: Members) -> Members:
    """The same models as they lie."""

    def plain(member: Member) -> Member:
        made = member.plan
        return member if made is None else replace(member, plan=replace(made, element=made.graph.identity()))

    base = None if members.base is None else plain(members.base)
    return replace(members, models=[plain(m) for m in members.models], base=base)


def compare(
    members: Members,
    direct: Mapping[str, Tensor],
    matched: Mapping[str, Tensor],
    *,
    batch_size: int,
    device: str,
) -> Comparison:
    """Run both merged networks and the models on calibration inputs.

    Args:
        members: the models with their calibration data.
        direct, matched: complete merged state dicts, repaired as they would be written.
    """
    found, unit = distances(
        members.first,
        [m.loaded.model for m in members.models],
        (direct, matched),
        shares=_shares(members),
        dataset=members.dataset,
        collate=members.collate,
        batch_size=batch_size,
        device=device,
    )
    gap = found[1] - found[0]
    error = float(gap.std()) / sqrt(len(gap)) if len(gap) > 1 else float("inf")
    means = found.mean(1).tolist()
    # what is not finite in the matched merge alone speaks against it
    worse = float(gap.mean()) > SIGMAS * error if bool(torch.isfinite(found).all()) else means[0] < float("inf")
    return Comparison(means[0], means[1], unit, found.shape[1], worse)


def distances(
    first: Loaded,
    models: Sequence[nn.Module],
    states: Sequence[Mapping[str, Tensor]],
    *,
    shares: Sequence[float],
    dataset: Any,
    collate: Callable[[Any], Any] | None,
    batch_size: int,
    device: str,
) -> tuple[Tensor, str]:
    """How far merged networks are from what the models say.

    Args:
        first: of the models, how they are run.
        models: the networks that were merged; `shares` are their weights in the mean prediction.
        states: complete state dicts of merged networks.
        dataset: of which up to `EXAMPLES`, evenly spaced, are looked at, without labels.

    Returns:
        float64 [states, examples], and the unit as in `Comparison`.
    """
    nets = [_with(first.model, state, device) for state in states]
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
            own = [first.forward(m, batch).double() for m in models]
            outs = [first.forward(net, batch).double() for net in nets]
        if classifies:
            target = sum(w * o.softmax(-1) for w, o in zip(shares, own, strict=True))
            rows = [_per_example(-(target * o.log_softmax(-1)).sum(-1), batch) for o in outs]
        else:
            middle = sum(w * o for w, o in zip(shares, own, strict=True))
            spread += torch.tensor([middle.numel(), float(middle.sum()), float(middle.square().sum())])  # type: ignore[union-attr]
            rows = [_per_example((o - middle).square().mean(-1), batch) for o in outs]
        scores.append(torch.stack(rows).cpu())
    found = torch.cat(scores, 1)
    if not classifies:
        n, total, squares = spread.tolist()
        found = found / max(squares / n - (total / n) ** 2, 1e-300)
    return found, "nats" if classifies else "relative"


def _with(model: nn.Module, state: Mapping[str, Tensor], device: str) -> nn.Module:
    net = copy.deepcopy(model).to(device)
    load_weights(net, state)
    return net


def _shares(members: Members) -> list[float]:
    """Weights of the models in their mean prediction: those of the merge where they are shares, else equal ones."""
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
