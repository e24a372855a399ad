"""Merge two models or more."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid.combine.apply import check_base
from mergeid.errors import MergeidError, NoModel, WillNotMerge
from mergeid.io.checkpoint import Checkpoint
from mergeid.methods.registry import MergeMethod, get_method
from mergeid.methods.settings import MergeSettings, setting_of_weights
from mergeid.models.loaded import Example
from mergeid.models.offload import state_of
from mergeid.models.pair import LIMIT, Progress, Source, is_module, open_models, output_path
from mergeid.request.boundary import verb
from mergeid.stages.planned import common_order, plan_pair
from mergeid.stages.write import Inputs, write

if TYPE_CHECKING:
    from torch import Tensor

    from mergeid.stages.compare import Comparison
    from mergeid.stages.members import Members
    from mergeid.stages.plan import Plan

MATCHES = ("auto", "never", "always")
REPAIRS = ("auto", "bn", "repair", "solve", "none")
REFUSE_ABOVE = 0.5
"""Distance from the models beyond which a merge is not written: half a nat, or half of an output's variance."""


@dataclass
class MergeResult:
    """What a merge (or an alignment) did.

    Attributes:
        files: what was written, weights first.
        plan: the decisions for the second model; None for a plain merge.
        plans: the decisions for every further model and, last, the base, each against the first.
        verdict: "direct", "match" or "will not merge"; "transported" where neurons were carried by optimal transport.
        notes: what the user should know.
        repaired: tensors that were repaired after the merge.
        comparison: how far the merges that were at hand are from the models on calibration inputs, and which was chosen
            (`mergeid.stages.compare`); None without data.
        repair: what the repair stage did, with the spread of activations before and after; None where there was none.
        state: the merged state dict, for live modules.
        report: what happened to the tensors, as JSON.
    """

    verdict: str
    files: list[Path] = field(default_factory=list)
    plan: Plan | None = None
    notes: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    state: dict[str, Tensor] | None = None
    report: dict[str, Any] = field(default_factory=dict)
    plans: list[Plan] = field(default_factory=list)
    repair: dict[str, Any] | None = None
    comparison: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "files": [str(f) for f in self.files],
            "notes": self.notes,
            "repaired": self.repaired,
            "repair": self.repair,
            "comparison": self.comparison,
            "report": self.report,
            "plan": self.plan.to_json() if self.plan else None,
            "further_plans": [plan.to_json() for plan in self.plans[1:]],
        }


@verb
def merge(
    a: Source | Sequence[Source],
    b: Source | None = None,
    *more: Source,
    base: Source | None = None,
    output: str | os.PathLike[str] | None = None,
    weights: Sequence[Any] | Mapping[str, Sequence[float]] | None = None,
    normalize: bool | None = None,
    method: str = "linear",
    density: float | Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    match: str = "auto",
    matcher: str | None = None,
    transport: bool = False,
    data: Any = None,
    repair: bool | str = True,
    refuse_above: float = REFUSE_ABOVE,
    arch: str | None = None,
    config: str | None = None,
    dtype: str | None = None,
    skip: Sequence[str] = (),
    force: bool = False,
    seed: int = 0,
    limit: int | None = LIMIT,
    batch_size: int = 32,
    device: str = "cpu",
    allow_pickle: bool = False,
    example_inputs: Any = None,
    outputs: Sequence[str] = (),
    progress: Progress | None = None,
) -> MergeResult:
    """Merge two models or more, matched where the plan says so.

    Args:
        a, b, more: files, folders, hub ids, or live modules (then `MergeResult.state` holds the result); or one list
            of them. Every further model is brought into the first one's order.
        base: the model that they were fine-tuned from, for methods that need it.
        output: ``.safetensors`` file or folder; default ``./merged.safetensors``, for folders ``./merged``.
        weights: one per model (shares with sum 1; factors of any size for task vectors), or glob of tensor names ->
            one per model, of which the first that matches counts. Default: equal shares.
        normalize: True: scale the weights to sum 1; False: take them as they are; None: shares of another sum are
            refused.
        method: name in the registry (`mergeid.methods.registry`).
        density: the method's parameter of that name, one or one per model.
        parameters: further parameters of the method by name: one value, or a list with one per model.
        match: "auto": as decided per space; "never": a plain merge, no model is built; "always": match every space.
        matcher: how neurons are matched (`mergeid.matchers.matcher_names`); default: combined with data, else weight.
            "cycle" brings more than two models into one common order.
        transport: carry the neurons of every further model onto the first one's by optimal transport plans instead of
            matching them one to one (OT fusion); plain layers may then have other widths. Needs no `base`.
        data: calibration data for the evidence, for the repair, and for methods that measure something.
        repair: "bn": estimate the BatchNorm statistics of the merged network again on `data`; "repair": rescale its
            pre-activations (REPAIR); "solve": every layer in closed form, towards the models' own answers
            (`mergeid.repair.solve`); True or "auto": "solve", "bn" or "repair", where the merge is
            nearer to the models with it; False or "none": nothing.
        refuse_above: with `data`, the distance from the models beyond which no merge is written: nats by which it is
            farther from their predictions than they are themselves, for outputs that are no classification the share
            of their variance (`mergeid.evaluate.nearness`).
        outputs: names or globs of those outputs of live modules that count (``"logits"``, ``"0"``); default: all.
        config: "a" (the first model), "b", …: whose config the result gets where configs differ in what the network
            computes; None: that is refused.
        force: overwrite, and merge even when the plan, or the last look, says that it will not work.

    Raises:
        WillNotMerge: the plan says no, or even the nearest merge is too far from the models (and `force` is not
            given); nothing was written.
        MergeidError: anything wrong with the input; nothing was written.
    """
    chosen = get_method(method)
    models = _listed(a, b, more, chosen.least if chosen.most == 1 or base is not None else 2)
    check_base(chosen, base is not None)
    stage = ("auto" if repair else "none") if isinstance(repair, bool) else repair
    _check_modes(chosen, match, stage, data)
    _check_limit(refuse_above)
    if transport:
        check_transport(match, matcher, base)
    elif matcher is not None:
        from mergeid.matchers.protocol import check_matcher

        check_matcher(matcher, match, data is not None)
    live = is_module(models[0])
    target = None if live and output is None else output_path(output, [*models, base, data, arch], force)
    if live and len(models) > 2 and config not in (None, "a"):
        raise MergeidError("of more than two live modules the first one's config counts (a); put that module first")
    met = open_models(
        models, base, skip=skip, config=config, arch=arch, widths=not transport, allow_pickle=allow_pickle
    )
    skip = met.skip
    if not live:
        models, base, config = [*met.agreed.models], met.agreed.base, None
    settings = MergeSettings.of(
        chosen,
        len(models),
        _float_names(met.agreed.models[0], skip),
        weights=setting_of_weights(weights),
        parameters=_with_density(parameters, density),
        normalize=normalize,
        seed=seed,
    )
    result = MergeResult("direct", notes=list(met.agreed.notes))
    if match == "auto" and data is None and not transport and not live:
        from mergeid.io.lora_forming import shared_base

        on = shared_base([*met.agreed.models, *([met.agreed.base] if met.agreed.base is not None else [])])
        if on is not None:
            match = "never"
            result.notes.append(f"all lie on {on.source}, whose neurons they share: nothing needs to be matched")
    members: Members | None = None
    repaired: dict[str, Tensor] = {}
    common: dict[str, Any] = {
        "skip": skip,
        "data": data,
        "arch": arch,
        "config": config,
        "seed": seed,
        "limit": limit,
        "batch_size": batch_size,
        "device": device,
        "allow_pickle": allow_pickle,
        "example_inputs": Example.of(example_inputs, outputs),
        "progress": progress,
    }
    if transport:
        from mergeid.stages.transport import transported_members

        members, result.verdict = transported_members(models, settings, **common), "transported"
    elif (match != "never" or data is not None) and (models[1:] or base is not None):
        how = {"match": match, "matcher": matcher, "dtype": dtype, **common}
        try:
            members = _plan_all(models, base, settings, result, force, **how)
        except NoModel as error:
            if match != "auto" or chosen.statistics:
                raise
            without = " (without --data)" if data is not None else ""
            raise NoModel(
                f"{error}; or merge the tensors as they lie with --match never{without}, which builds no model"
            ) from error
    if members is not None:
        from mergeid.stages.repair import repair_merged

        if chosen.statistics:
            members.measure(batch_size, device, seed, progress or (lambda *_: None))
        if members.dataset is not None:
            members, found = _look(members, result, stage, match, skip, batch_size, device, progress)
            why = found.refused(refuse_above)
            if why and not force:
                names = " and ".join(m.loaded.source for m in members.models)
                raise WillNotMerge(f"{names} will not merge: {why}; nothing was written (--force writes all the same)")
            result.notes += [f"{why}: written all the same, as asked with --force"] if why else []
            done = repair_merged(members, mode=found.repair, skip=skip, device=device, progress=progress)
            result.notes += done.notes
            result.repair, repaired = done.to_json(), done.tensors
        elif result.verdict in ("match", "transported") and _has_batchnorm(members):
            result.notes.append(
                "the BatchNorm statistics are averages, not those of the merged network, which costs much of its "
                "accuracy: give --data (without --no-repair) to estimate them again"
            )
    result.repaired = sorted(repaired)
    if target is None:
        result.state = {**_state(models, base, members, settings, skip), **repaired}
        return result
    inputs = Inputs.of(models, base, members, repaired, allow_pickle)
    return write(result, inputs, target, settings, dtype, skip, force, progress, met.agreed.record())


def _look(
    members: Members,
    result: MergeResult,
    stage: str,
    match: str,
    skip: Sequence[str],
    batch_size: int,
    device: str,
    progress: Progress | None,
) -> tuple[Members, Comparison]:
    """The nearest merge, of all where the plan decides and else of what was asked for; the result says so."""
    from mergeid.stages.compare import MATCHED, PLAIN, last_look

    chosen, found = last_look(
        members,
        stage,
        among=match == "auto",
        skip=skip,
        batch_size=batch_size,
        device=device,
        progress=progress,
    )
    result.comparison = found.to_json()
    if found.note:
        if found.chosen == PLAIN:
            result.verdict = "direct"
        elif found.chosen == MATCHED and result.verdict == "direct":
            result.verdict = "match"
        result.notes.append(found.note)
        result.plans = [m.plan for m in [*chosen.models, chosen.base] if m is not None and m.plan is not None]
        result.plan = result.plans[0]
    return chosen, found


def _listed(a: Source | Sequence[Source], b: Source | None, more: Sequence[Source], least: int) -> list[Source]:
    given: list[Any] = [*a, b, *more] if isinstance(a, (list, tuple)) else [a, b, *more]
    models: list[Source] = [m for m in given if m is not None]
    if len(models) < least:
        raise MergeidError(f"merging takes {'two models' if least == 2 else 'a model'} at least, got {len(models)}")
    return models


def check_transport(match: str, matcher: str | None, base: Source | None) -> None:
    """Raises `MergeidError` for what optimal transport has no use for."""
    for option, given in (
        ("--match", match != "auto"),
        ("--matcher", matcher is not None),
        ("--base", base is not None),
    ):
        if given:
            raise MergeidError(
                f"{option} does not go with --transport, which matches no neuron to one other; leave it out"
            )


def _check_modes(method: MergeMethod, match: str, stage: str, data: Any) -> None:
    if match not in MATCHES:
        raise MergeidError(f"--match {match!r} is not one of auto, never, always")
    if stage not in REPAIRS:
        raise MergeidError(f"--repair {stage!r} is not one of {', '.join(REPAIRS)}")
    if data is None and stage in ("bn", "repair", "solve"):
        raise MergeidError(f"--repair {stage} measures activations; give examples with --data")
    if data is None and method.statistics:
        what = "Gram matrices of the layers' inputs" if method.statistics == "gram" else "the Fisher information"
        raise MergeidError(f"method {method.name!r} measures {what}; give examples with --data")


def _check_limit(refuse_above: float) -> None:
    number = isinstance(refuse_above, (int, float)) and not isinstance(refuse_above, bool)
    if not number or not refuse_above >= 0:
        raise MergeidError(f"--refuse-above is {refuse_above!r}; expected a distance of 0 or more (inf: never refuse)")


def _with_density(parameters: Mapping[str, Any] | None, density: float | Sequence[float] | None) -> dict[str, Any]:
    found = dict(parameters or {})
    if density is not None:
        found["density"] = density if isinstance(density, (int, float)) else list(density)
    return found


def _float_names(first: Checkpoint, skip: Sequence[str]) -> list[str]:
    """Names of the tensors that settings speak of: the first model's, those that are merged."""
    from fnmatch import fnmatchcase

    from mergeid.combine.tensor_plan import MERGEABLE

    names = [n for n, info in first.table.items() if info.dtype in MERGEABLE]
    return [n for n in names if not any(fnmatchcase(n, p) for p in skip)]


def _plan_all(
    models: Sequence[Source],
    base: Source | None,
    settings: MergeSettings,
    result: MergeResult,
    force: bool,
    **how: Any,
) -> Members:
    """Plan every further model, and the base, against the first; the result gets plans, notes and verdict."""
    from mergeid.stages.members import Member, Members

    members: list[Member] = []
    dataset = collate = None
    others = [*models[1:], *([base] if base is not None else [])]
    elements = common_order(models[0], others, **how) if how["matcher"] is not None and len(others) > 1 else None
    for i, other in enumerate(others):
        planned = plan_pair(models[0], other, matched=elements[i] if elements else None, **how)
        made, pair = planned.plan, planned.pair
        if not members:
            members.append(Member(pair.a))
            dataset, collate = planned.dataset, planned.collate
        members.append(Member(pair.b, made))
        result.plans.append(made)
        about = f"{pair.b.source}: " if len(others) > 1 else ""
        result.notes += [about + note for note in made.notes]
        if made.verdict == "will not merge" and not force:
            raise WillNotMerge(
                f"{pair.a.source} and {pair.b.source} will not merge: {made.notes[-1]}; nothing was written (--force "
                "merges them all the same)"
            )
    verdicts = [plan.verdict for plan in result.plans]
    result.verdict = next((v for v in ("will not merge", "match") if v in verdicts), "direct")
    result.plan = result.plans[0]
    origin = members.pop() if base is not None else None
    return Members(members, origin, settings, dataset, collate)


def _state(
    models: Sequence[Any], base: Any, members: Members | None, settings: MergeSettings, skip: Sequence[str]
) -> dict[str, Tensor]:
    """The merged state dict of live modules."""
    if members is not None:
        return members.merged_state(skip)
    from mergeid.stages.members import merged_state

    origin = state_of(base) if base is not None else None
    return merged_state(
        [state_of(m) for m in models],
        settings,
        base=origin.__getitem__ if origin is not None else None,
        skip=skip,
    )


def _has_batchnorm(members: Members) -> bool:
    from mergeid.repair.batchnorm import batchnorm_layers

    return bool(batchnorm_layers(members.first.model))
