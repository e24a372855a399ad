"""The stage after a merge: give the merged network the activation statistics that it should have."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergeid.basics.on_demand import OnDemand, held, is_on_demand
from mergeid.basics.state import evaluating, load_weights, tensors_of
from mergeid.data.batches import FixedBatches, input_dtype, to_model
from mergeid.errors import MergeidError
from mergeid.models.running import make_accelerator
from mergeid.repair.batchnorm import batchnorm_layers, calibration_batches, reestimate_batchnorm
from mergeid.repair.kind_of_inputs import Moved, as_trained, moved
from mergeid.repair.rescale import Layer, output_moments, rescalable_layers, rescale
from mergeid.stages.members import Members, skipped_in

if TYPE_CHECKING:
    from collections.abc import Sequence

    from accelerate import Accelerator

    from mergeid.models.examples import Examples
    from mergeid.plugins import Batch
    from mergeid.repair.solve import Shares, SolvedLayer
    from mergeid.request.request import Progress

SOLVE = "solve"
REGMEAN = "regmean"
POLISHED = "solve+polish"
LEANING = "solve+lean"
SOLVED_AT_ONCE, POLISHED_AT_ONCE = 64, 32
"""Examples in a batch."""
UNSEEN = 4
"""Every fourth example judges a polish."""


@dataclass
class Repair:
    """What the stage did.

    Attributes:
        kind: "bn", "repair", "repair+bn", "regmean", "solve", "solve+lean", "solve+polish", or "" where there was
            nothing to do.
        tensors: state-dict key -> repaired tensor.
        layers: how many layers were repaired.
        before, after: median over all channels of the standard deviation of the merged network's activations, as a
            share of what it should be (BatchNorm: of what its statistics say; REPAIR: of the models' own average); of a
            solved network the mean error of its layers' answers on unseen examples, as a share of their spread.
        examples: calibration examples that were used.
        by_layer: of a solved network what was solved, in order of execution.
        leans_to: the model that the hidden layers imitate.
        polished: distance from what the models say together on examples that judge, before and after the polish.
        notes: what the user should know.
    """

    kind: str = ""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    layers: int = 0
    before: float = 1.0
    after: float = 1.0
    examples: int = 0
    notes: list[str] = field(default_factory=list)
    polished: tuple[float, float] | None = None
    by_layer: tuple[SolvedLayer, ...] = ()
    leans_to: str | None = None

    def to_json(self) -> dict[str, Any] | None:
        """Everything but the tensors; None where nothing was repaired."""
        if not self.kind:
            return None
        what = "error" if self.kind in (SOLVE, LEANING, POLISHED) else "spread"
        distances = {} if self.polished is None else dict(zip(("before", "after"), self.polished, strict=True))
        return {
            "kind": self.kind,
            "layers": self.layers,
            **({} if self.kind == REGMEAN else {f"{what}_before": self.before, f"{what}_after": self.after}),
            "examples": self.examples,
            **({} if self.leans_to is None else {"leans_to": self.leans_to}),
            **{f"distance_{when}": value for when, value in distances.items()},
        }


def repairs(members: Members, stage: str, device: str = "cpu") -> list[str]:
    """What can be done to a merge of these models, of "none", "bn", "repair" and "solve", the simplest first.

    Args:
        stage: "auto": nothing, or what this kind of network takes: estimating the statistics of its BatchNorm layers
            again, or REPAIR where it has none (whether to solve it is another question, `mergeid.stages.solving`).
            Anything else: that, where it applies.
    """
    norms = bool(batchnorm_layers(members.first.model))
    if stage == "auto":
        if norms:
            return ["none", "bn"]
        if is_on_demand(members.first.model):  # too large to be held, which rescaled weights are
            return ["none"]
        return ["none", "repair"] if _rescalable(members, members.first.model, device) else ["none"]
    if stage == POLISHED:  # judged as it is before the polish, which only brings it nearer
        return [SOLVE]
    return ["none"] if stage == "bn" and not norms else [stage]


def repair_merged(
    members: Members, *, mode: str, skip: Sequence[str] = (), device: str = "cpu", progress: Progress | None = None
) -> Repair:
    """Repair the merged network on the calibration data.

    Args:
        members: the models with settings and calibration data.
        mode: "bn": estimate the statistics of BatchNorm layers again; "repair": REPAIR of linear and convolutional
            layers, then of BatchNorm layers; "regmean": RegMean's linear layers (`mergeid.stages.regressed`), then
            BatchNorm statistics; "solve": every layer in closed form (`mergeid.repair.solve`);
            "solve+lean": the same, but hidden layers mostly answer as one model does (`mergeid.stages.imitated`): the
            one that the members name, or that of `mergeid.evaluate.trusted`; "none": nothing.
        skip: globs of tensor names that are not merged.
    """
    if mode == "none" or (mode == "bn" and not batchnorm_layers(members.first.model)):
        return Repair()
    merged = copy.deepcopy(members.first.model)
    load_weights(merged, members.merged_state(skip))
    return repair_network(members, merged, mode=mode, skip=skip, device=device, progress=progress)


def repair_network(
    members: Members,
    merged: nn.Module,
    *,
    mode: str,
    skip: Sequence[str] = (),
    device: str = "cpu",
    progress: Progress | None = None,
) -> Repair:
    """Repair a merged network of these models in place (and move it to the device), as `repair_merged`."""
    tell = progress or (lambda *_: None)
    accelerator = make_accelerator(device)
    if mode not in ("bn", SOLVE, LEANING):  # which write into no weight, or into one at a time
        held(merged)
    if mode in (SOLVE, LEANING):
        return _solve(members, merged.to(accelerator.device), skip, progress, lean=mode == LEANING)
    if mode == POLISHED:
        return _polish(members, merged.to(accelerator.device), skip, accelerator, progress)
    if mode == REGMEAN:
        return _regress(members, merged.to(accelerator.device), skip, accelerator, tell)
    found = Repair()
    if mode == "repair":
        tell("rescaling pre-activations (REPAIR)", 0, 1)
        found = _rescale(members, merged, accelerator, skip)
    if batchnorm_layers(merged):
        tell("estimating BatchNorm statistics", 0, 1)
        _reestimate(members, merged, accelerator, found, skip)
    return found


def _frozen(members: Members, keys: Iterable[str], skip: Sequence[str]) -> list[str]:
    """Keys of tensors that are not merged."""
    skipped = skipped_in(members.first.state(), members.names(), skip)
    return [k for k in keys if k in skipped]


def _aligned(members: Members, device: torch.device) -> Iterator[nn.Module]:
    """Every model in the first one's order of neurons."""
    for work in members.workspaces():
        yield evaluating(copy.deepcopy(work).to(device))


def _solve(
    members: Members, merged: nn.Module, skip: Sequence[str], progress: Progress | None, lean: bool = False
) -> Repair:
    from mergeid.evaluate.trusted import most_trusted
    from mergeid.repair.solve import solve_network
    from mergeid.stages.imitated import leant_shares, own_shares

    device = next(merged.parameters()).device
    models = list(_aligned(members, device))
    before = {k: v.clone() for k, v in tensors_of(merged).items()}
    shares: Sequence[float] | Tensor | Shares = own_shares(members)
    batches, leans_to = list(members.given.unlabelled(SOLVED_AT_ONCE, members.first, device)), None
    if lean:
        to = members.leans
        if to is None:
            to = most_trusted(members.first, models, members.shares(), members.batches(SOLVED_AT_ONCE, str(device)))
        leans_to = members.models[to].loaded.source
        leant, shares = leant_shares(members, to)
        load_weights(merged, leant.merged_state(skip))
    done = solve_network(
        evaluating(merged),
        models,
        shares,
        members.first.forward,
        batches,
        frozen=_frozen(members, before, skip),
        heads=members.first.head,
        progress=(lambda k, n: progress("solving layer by layer", k, n)) if progress else None,
    )
    count = max(len(done), 1)
    return Repair(
        LEANING if lean else SOLVE,
        _changed(merged, before),
        sum(layer.ridge < inf for layer in done),
        sum(layer.before for layer in done) / count,
        sum(layer.after for layer in done) / count,
        len(members.given),
        by_layer=tuple(done),
        leans_to=leans_to,
    )


def _regress(
    members: Members, merged: nn.Module, skip: Sequence[str], accelerator: Accelerator, tell: Progress
) -> Repair:
    from mergeid.request.request import Run
    from mergeid.stages.regressed import regress

    before = {k: v.clone() for k, v in tensors_of(merged).items()}
    layers = regress(members, merged, skip, Run(str(accelerator.device), tell=tell))
    if batchnorm_layers(merged):
        _reestimate(members, merged, accelerator, Repair(), skip)
    return Repair(REGMEAN, _changed(merged, before), layers, examples=len(members.given))


def _changed(merged: nn.Module, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().cpu() for k, v in tensors_of(merged).items() if not _equal(v, before[k])}


def _equal(one: Tensor, other: Tensor) -> bool:
    if isinstance(one, OnDemand) and isinstance(other, OnDemand):
        return one.cell.form is other.cell.form
    return torch.equal(one, other)


def _polish(
    members: Members, merged: nn.Module, skip: Sequence[str], accelerator: Accelerator, progress: Progress | None
) -> Repair:
    """Solve, then distil. At first every fourth example takes part in neither, and judges; then both are done again
    on all examples, with as many steps."""
    from mergeid.evaluate.nearness import classifying
    from mergeid.repair.polish import Aim, polish_network, polished_again

    device = next(merged.parameters()).device
    count = len(members.given)
    kept = [i for i in range(count) if i % UNSEEN == UNSEEN - 1]
    if not kept:
        raise MergeidError(
            f"a polished merge is judged on every {UNSEEN}th example, and there are {count}; give more with --data"
        )
    before = {k: v.clone() for k, v in tensors_of(merged).items()}
    frozen = _frozen(members, before, skip)
    fit = replace(members, examples=members.given.taken([i for i in range(count) if i % UNSEEN != UNSEEN - 1]))
    _solve(fit, merged, skip, progress)

    def batches(part: Examples) -> list[Batch]:
        return list(part.unlabelled(POLISHED_AT_ONCE, members.first, device))

    def dealt(examples: Examples, generator: torch.Generator) -> list[Batch]:
        return batches(examples.taken(torch.randperm(len(examples), generator=generator).tolist()))

    aim = Aim(
        [held(net) for net in _aligned(members, device)],
        members.shares(),
        members.first.outputs,
        frozenset(classifying(members.first)),
    )
    done = polish_network(
        merged,
        aim,
        partial(dealt, fit.given),
        batches(members.given.taken(kept)),
        accelerator=accelerator,
        frozen=frozen,
        progress=(lambda k, n: progress("polishing", k, n)) if progress else None,
    )
    merged.load_state_dict(before, strict=False)
    found = _solve(members, merged, skip, progress)
    polished_again(merged, aim, partial(dealt, members.given), done, accelerator=accelerator, frozen=frozen)
    return replace(
        found, kind=POLISHED, tensors=_changed(merged, before), examples=count, polished=(done.before, done.after)
    )


def _reestimate(
    members: Members, merged: nn.Module, accelerator: Accelerator, found: Repair, skip: Sequence[str]
) -> None:
    forward = members.first.forward
    state = tensors_of(merged)
    kept = {key: state[key].clone() for key in _frozen(members, state, skip)}
    examples = members.given
    batches = calibration_batches(
        merged, examples.items, forward=forward, collate=examples.collate, accelerator=accelerator
    )
    old = {
        n: layer.running_var.double().cpu()
        for n, layer in batchnorm_layers(merged).items()
        if layer.running_var is not None
    }
    # what was averaged says nothing about rescaled layers
    shrink = not found.kind
    found.tensors |= reestimate_batchnorm(merged, batches, forward=forward, accelerator=accelerator, shrink=shrink)
    as_trained(merged, _moved(members, batches, accelerator))
    merged.load_state_dict(kept, strict=False)
    for key in kept:
        found.tensors.pop(key, None)  # as it was
    if not found.kind:
        new = {
            n: layer.running_var.double().cpu()
            for n, layer in batchnorm_layers(merged).items()
            if layer.running_var is not None
        }
        ratios = torch.cat([(new[n] / old[n].clamp(min=1e-30)).sqrt() for n in old])
        found.before, found.after = ratios.median().item(), 1.0
        found.layers, found.examples = len(old), len(batches.dataset)
    found.kind = "repair+bn" if found.kind else "bn"


def _moved(members: Members, batches: FixedBatches, accelerator: Accelerator) -> list[Moved]:
    """The statistics of every model that counts, its own and on the same inputs. Models that were carried by optimal
    transport are left out: they compute something else now, which their own statistics do not fit."""
    same = [k == 0 or m.plan is not None for k, m in enumerate(members.models)]
    weights = [max(w, 0.0) if kept else 0.0 for w, kept in zip(members.shares(), same, strict=True)]
    found = []
    for work, weight in zip(members.workspaces(), weights, strict=True):
        if weight > 0:
            share, forward = weight / sum(weights), members.first.forward
            found.append(moved(work, batches, share, forward=forward, accelerator=accelerator))
    return found


def _rescalable(members: Members, model: nn.Module, device: str | torch.device) -> list[Layer]:
    """Layers that REPAIR can rescale, by one example."""
    batch = next(members.batches(1, str(device)))
    return rescalable_layers(model.to(device), batch, forward=members.first.forward)


def _rescale(members: Members, merged: nn.Module, accelerator: Accelerator, skip: Sequence[str]) -> Repair:
    forward, names = members.first.forward, members.names()
    fixed = {key.rpartition(".")[0] for key in _frozen(members, tensors_of(merged), skip)}
    layers = [layer for layer in _rescalable(members, merged, accelerator.device) if layer.name not in fixed]
    if not layers:
        return Repair(notes=["REPAIR found no linear or convolutional layer that it could rescale"])
    sized = calibration_batches(
        merged,
        members.given.items,
        forward=forward,
        collate=members.given.collate,
        accelerator=accelerator,
        layers=[merged.get_submodule(layer.name) for layer in layers],
    )
    batches = [to_model(b, accelerator.device, input_dtype(merged)) for b in sized]
    means: dict[str, Tensor] = {}
    stds: dict[str, Tensor] = {}
    for i, work in enumerate(members.workspaces()):
        moments = output_moments(work.to(accelerator.device), layers, batches, forward=forward)
        for layer in layers:
            key = f"{layer.name}.weight" if layer.name else "weight"
            share = members.shares(names.get(key, key))[i]
            found = moments[layer.name]
            means[layer.name] = means.get(layer.name, 0) + share * found.mean
            stds[layer.name] = stds.get(layer.name, 0) + share * found.std
    targets = {name: (means[name], stds[name].clamp(min=0)) for name in means}
    done = rescale(merged, layers, targets, batches, forward=forward)
    notes = []
    if done.without_bias:
        notes.append(
            f"REPAIR could only scale {len(done.without_bias)} of {len(done.layers)} layers, as these have no bias: "
            f"their means stay as they are (first: {done.without_bias[0]})"
        )
    return Repair("repair", dict(done.tensors), len(done.layers), done.before, done.after, len(sized.dataset), notes)
