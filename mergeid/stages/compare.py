"""The last look before a merge is written: which one is nearest to the models, and is it near enough?

A plan judges neurons space by space, and what it cannot see (statistics of BatchNorm layers, errors that add up over
depth) can still make its merge the worse one. Up to three merges are at hand: the plain one, the one that is planned,
and the one with every space matched; each as it is, and with BatchNorm statistics estimated again, or with REPAIR. All
are run on calibration inputs, without labels, and compared with what the models themselves say
(`mergeid.evaluate.nearness`). The nearest is written; ties (`TIE`) stay with the simplest: no repair before one, and
the planned merge before another.

BatchNorm statistics that are estimated again stand for those of the training's inputs, whatever kind the calibration
inputs are of (`mergeid.repair.kind_of_inputs`), so that they are compared with the models as they are. Averaged ones
are kept only where they are nearer by more than chance (`DOUBT`), or as near (`SAME`).

A repair is judged on inputs that it has not seen. The inputs are dealt out to `PARTS` parts; the network that is run on
one is repaired on the others. What is written is then repaired on all of them: more than any of the trials had, so that
it is, on average, nearer than the figure that it was chosen by.

Inputs on which the models are sure and do not agree seem to be of another kind (`Comparison.unlike`), and so may those
that they call by one name; what is then solved leans to one model (`mergeid.stages.solving`). Models of one start that
are sure of different answers (`Comparison.apart`) are not solved at all, nor rescaled on inputs that seem to be of
another kind: REPAIR lost 0.07 to 0.26 nats there in four of four pairs of the zoo. BatchNorm statistics stand for those
of the training's inputs, and do no such harm.

Where every model has its own data, a solved merge that stays far from them (`LEFT`) is tried once more for each model,
with hidden layers that lean to it (`mergeid.stages.imitated`).

Where even the nearest merge is too far from the models (`Comparison.refused`), it should not be written: its distance
is an excess over what the models reach themselves, so that neither their own doubts nor their disagreement counts.

Cost: every model and every merge runs on up to `EXAMPLES` inputs; one merged network is held at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import inf, isfinite, sqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergeid.basics import processes
from mergeid.basics.on_demand import is_on_demand
from mergeid.basics.state import load_weights
from mergeid.errors import MergeidError
from mergeid.evaluate.nearness import Far, Panel, joined
from mergeid.neuron_graph.group import same_element
from mergeid.results.comparison import MATCHED, MIXED, PLAIN, Comparison, Distance, label
from mergeid.results.plan import Plan
from mergeid.stages.members import Member, Members
from mergeid.stages.regressed import can_be_regressed
from mergeid.stages.repair import LEANING, POLISHED, REGMEAN, SOLVE, repair_network, repairs
from mergeid.stages.solving import (
    DISJOINT,
    LEFT,
    NEAR,
    OFF,
    Tried,
    can_be_solved,
    nearer,
    of_one_start,
    solved_if_nearer,
)

if TYPE_CHECKING:
    from mergeid.request.request import Run

TIE = 1e-3
"""Nats (or share of an output's variance) that another merge must be nearer by than a simpler one. Merges that differ
in dead or equal neurons only are equal, up to rounding."""
DOUBT = 2.0
"""Standard errors that a merge with averaged BatchNorm statistics must be nearer by than with statistics estimated
again."""
SAME = 1e-4
"""Nats (or share of an output's variance) that statistics estimated again must make a difference of."""
ROUNDING = 16
"""Machine epsilons of a tensor's largest entry that do not count as a change."""
FEW = 4
"""Examples in a batch of networks that are too large to be held: their outputs are large as well."""
PARTS = 4
"""Parts that the calibration inputs are dealt out to where a repair is judged: it then has three quarters of them."""
PARTS_OF_DEAR = 2
"""The same where the network is solved, which takes long (`mergeid.stages.solving`)."""


def last_look(
    members: Members,
    stage: str,
    *,
    among: bool = True,
    one_task: bool = True,
    skip: Sequence[str] = (),
    run: Run,
) -> tuple[Members, Comparison]:
    """The merge to write, not repaired yet, and the comparison that it comes from.

    Args:
        members: the models with their plans and calibration data.
        stage: the repair that is asked for; "auto": the nearest.
        among: compare the planned merge with the others; else it alone is looked at, with the repairs.
        one_task: the models may be expected to agree about the inputs.
        skip: globs of tensor names that are not merged.
    """
    planned, merges = merges_of(members)
    if not among:
        merges = {planned: members}
    kinds = repairs(members, stage, run.place)
    fixed = (*skip, *(members.first.joined.tensors if members.first.joined is not None else ()))
    if kinds[0] == "none" and len(kinds) > 1 and any(_is_the_first(merge, fixed) for merge in merges.values()):
        kinds = ["none"]
    voices = _voices(members)
    panel_of = partial(
        Panel,
        members.first,
        [m.loaded.model for m, _ in voices],
        shares=[share for _, share in voices],
        examples=members.given,
        batch_size=min(run.batch_size, FEW) if is_on_demand(members.first.model) else run.batch_size,
        device=run.place,
    )
    dear = not {SOLVE, LEANING}.isdisjoint(kinds)
    parts = 1 if kinds == ["none"] else PARTS_OF_DEAR if dear else PARTS
    dearest = dear and is_on_demand(members.first.model)
    run.tell("running the models", 0, 1)
    panel = panel_of(parts=(parts, 1) if dearest else parts)
    found: dict[tuple[str, str], dict[str, Far]] = {}
    for name, merge in merges.items():
        run.tell("comparing the merges", len(found), len(merges) * len(kinds))
        for kind, (far,) in _tried((panel,), merge, kinds, skip=skip, run=run):
            found[name, kind] = far
    chosen = compare(found, planned, panel.examples)
    if stage not in ("auto", POLISHED) and chosen.repair != "none":
        others = _tried((panel,), merges[chosen.chosen], repairs(members, "auto", run.place), skip=skip, run=run)
        chosen = _beside_unasked(chosen, found[chosen.chosen, chosen.repair], others)
    if chosen.repair == SOLVE:
        far = found[chosen.chosen, SOLVE]
        return _leant(merges[chosen.chosen], chosen, far, partial(_tried, (panel,), skip=skip, run=run), run)
    if stage == "auto" and chosen.worst.value > NEAR and can_be_solved(members):
        said = panel.agreement() if one_task else {}
        chosen = replace(chosen, unlike=next((a for a in said.values() if not a.told), None))
        if said and panel.disagreement > DISJOINT and of_one_start(merges[chosen.chosen]):
            plain = chosen.chosen, "none"
            if chosen.unlike is not None and chosen.repair == "repair" and plain in found:
                chosen = replace(chosen, repair="none", outputs=_outputs(found[plain]))
            return merges[chosen.chosen], replace(chosen, apart=panel.disagreement)
        run.tell("trying a solved merge", 0, 1)
        also = {MATCHED} if chosen.worst.value > OFF else set()
        some = {name: merge for name, merge in merges.items() if name == chosen.chosen or name in also}
        # from the models, and from their mean alone
        panels = (panel_of(parts=PARTS_OF_DEAR), panel_of(parts=PARTS_OF_DEAR, either=False))
        return _solved(chosen, some, panels, partial(_tried, panels, skip=skip, run=run), run)
    return merges[chosen.chosen], chosen


def _solved(
    chosen: Comparison, merges: Mapping[str, Members], panels: tuple[Panel, Panel], tried: Tried, run: Run
) -> tuple[Members, Comparison]:
    """The comparison with the solved merge as the one to write where that is nearer, or with its leaning twin.

    Args:
        merges: that may be solved, the chosen one among them.
    """
    apart = panels[0].disagreement
    if chosen.unlike is not None:
        refits = [LEANING]
    else:
        refits = [*([REGMEAN] if can_be_regressed(merges[chosen.chosen]) else []), SOLVE]
    nearest = chosen.chosen, chosen.repair
    solved = solved_if_nearer(merges, nearest, tried, disagreement=apart, tie=TIE, refits=refits)
    if solved is None:
        return merges[chosen.chosen], chosen
    repair, far, distances = solved.repair, solved.far, {label(*k): v for k, v in solved.distances.items()}
    one_task = panels[0].owners is None and merges[solved.merge].first.joined is None
    if _mean(far) > LEFT and one_task and chosen.unlike is None:
        leant = _leaning(merges[solved.merge], tried, run)
        if leant is not None:
            lean, mean = leant
            distances[label(solved.merge, LEANING)] = _mean(lean)
            if nearer(solved.mean, mean, disagreement=0.0, tie=TIE):
                repair, far = LEANING, lean
    chosen = replace(chosen, distances=chosen.distances | distances, chosen=solved.merge)
    chosen = replace(chosen, repair=repair, outputs=_outputs(far))
    return _leant(merges[solved.merge], chosen, far, tried, run)


def _beside_unasked(
    chosen: Comparison, own: Mapping[str, Far], others: Iterator[tuple[str, list[dict[str, Far]]]]
) -> Comparison:
    """The comparison with the same merge under what would be done to it unasked, and which of that is nearer by more
    than chance."""
    found = {kind: far for kind, (far,) in others if kind != chosen.repair}
    means = {kind: _mean(far) for kind, far in found.items()}
    best = min(means, key=lambda kind: means[kind])
    gap, error = _mean(own) - means[best], _error(own, found[best]) or 0.0
    return replace(
        chosen,
        distances=chosen.distances | {label(chosen.chosen, kind): mean for kind, mean in means.items()},
        unasked=label(chosen.chosen, best) if gap > max(TIE, error) or not isfinite(_mean(own)) else None,
    )


def _outputs(far: Mapping[str, Far]) -> dict[str, Distance]:
    return {name: Distance(f.distance, f.unit) for name, f in far.items()}


def _leant(
    merge: Members, chosen: Comparison, far: Mapping[str, Far], tried: Tried, run: Run
) -> tuple[Members, Comparison]:
    """Where every model has its own data: with hidden layers that lean to the model for which that is nearest, where it
    is nearer by more than `LEFT`."""
    if chosen.repair != SOLVE or merge.given.owners is None or merge.first.joined is not None or _mean(far) <= LEFT:
        return merge, chosen
    ways = [replace(merge, leans=k) for k in range(len(merge.models))]
    known = [(one, look[0]) for one in ways if (look := _leaning(one, tried, run)) is not None]
    if not known:
        return merge, chosen
    best, lean = min(known, key=lambda one: _mean(one[1]))
    distances = {**chosen.distances, label(chosen.chosen, LEANING): _mean(lean)}
    if not nearer(far, lean, disagreement=0.0, tie=LEFT):
        return merge, replace(chosen, distances=distances)
    return best, replace(chosen, distances=distances, repair=LEANING, outputs=_outputs(lean), unasked=None)


def _leaning(merge: Members, tried: Tried, run: Run) -> Sequence[Mapping[str, Far]] | None:
    """How far its solved merge that leans to one model is; None where it cannot be solved (the average may route
    its inputs to other experts than the models do)."""
    run.tell("trying a solved merge that leans to one model", 0, 1)
    try:
        ((_, far),) = tried(merge, [LEANING])
    except MergeidError:
        return None
    return far


def _is_the_first(members: Members, skip: Sequence[str]) -> bool:
    """Whether a merge is the first model again, up to rounding, such as that of a model with its scrambled copy: there
    is nothing to repair then, whatever the calibration inputs say of the model."""
    ours = members.first.state()
    return all(_same(ours[key], merged) for key, merged in members.merged_tensors(skip))


def _same(ours: Tensor, merged: Tensor) -> bool:
    if not ours.is_floating_point() or not ours.numel():
        return torch.equal(ours, merged)
    gap, size = (ours.double() - merged.double()).abs().max(), ours.double().abs().max()
    return bool(gap <= ROUNDING * torch.finfo(ours.dtype).eps * size)


def _tried(
    panels: Sequence[Panel], members: Members, kinds: Sequence[str], *, skip: Sequence[str], run: Run
) -> Iterator[tuple[str, list[dict[str, Far]]]]:
    """How far one merge is from the models, under each repair, as each of the panels sees it; they have the same
    parts."""
    state = members.merged_state(skip)
    net = copy.deepcopy(members.first.model).to(run.place)

    def tell(stage: str, done: int, total: int) -> None:
        run.tell(f"on trial: {stage}", done, total)

    def far(kind: str, part: int) -> list[dict[str, Far]]:
        load_weights(net, state)
        if kind != "none":
            rest = replace(members, examples=panels[0].rest(part))
            repair_network(rest, net, mode=kind, skip=skip, device=run.place, progress=tell)
        return [panel.far(net, part) for panel in panels]

    for kind in kinds:
        parts = processes.shared(range(len(panels[0].parts)), partial(far, kind))
        yield kind, [joined(each) for each in zip(*parts, strict=True)]


def compare(found: Mapping[tuple[str, str], Mapping[str, Far]], planned: str, examples: int) -> Comparison:
    """Choose among merges.

    Args:
        found: (merge, repair) -> output -> how far it is from the models.
        planned: the merge to prefer.
        examples: how many were compared.
    """
    means = {key: _mean(far) for key, far in found.items()}
    simplest = sorted(found, key=lambda key: (key[1] != "none", key[0] != planned))
    best = _first(means, simplest)
    if {repair for _, repair in found} == {"none", "bn"}:
        kept, again = (_first(means, [k for k in simplest if k[1] == repair]) for repair in ("none", "bn"))
        error = _error(found[again], found[kept])
        gap = means[again] - means[kept]
        # infinite less infinite is no number
        keep = not gap <= max(DOUBT * (error or 0.0), 0.0) or abs(gap) <= SAME
        best = kept if keep else again
    merge, repair = best
    own = min((key for key in found if key[0] == planned), key=lambda key: means[key])
    return Comparison(
        {label(*key): mean for key, mean in means.items()},
        planned,
        merge,
        repair,
        _outputs(found[merge, repair]),
        examples,
        None if merge == planned else _error(found[own], found[merge, repair]),
    )


def _first(means: Mapping[tuple[str, str], float], keys: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """The first of the keys whose mean is as small as any of theirs."""
    least = min(means[key] for key in keys)
    # what is not finite in all of them is no reason to leave the plan
    return next(key for key in keys if means[key] <= least + TIE or least == inf)


def _mean(far: Mapping[str, Far]) -> float:
    return sum(f.distance for f in far.values()) / len(far)


def _error(one: Mapping[str, Far], other: Mapping[str, Far]) -> float | None:
    """Standard error of the difference of two merges' mean distances."""
    gap = torch.stack([one[name].nearest - other[name].nearest for name in one]).mean(0)
    error = float(gap.std()) / sqrt(len(gap)) if len(gap) > 1 else inf
    return error if isfinite(error) else None


def merges_of(members: Members) -> tuple[str, dict[str, Members]]:
    """The planned merge's name, and the merges that differ."""
    plans = members.plans
    full = all(same_element(plan.element, plan.full().element) for plan in plans)
    matched = {} if full else {MATCHED: _under(members, Plan.full)}
    if not any(plan.moves for plan in plans):
        return PLAIN, {PLAIN: members, **matched}
    plain = {PLAIN: _under(members, Plan.plain)}
    if full:
        return MATCHED, {**plain, MATCHED: members}
    return MIXED, {**plain, MIXED: members, **matched}


def _under(members: Members, planned: Callable[[Plan], Plan]) -> Members:
    """The same models, each under another plan."""

    def other(member: Member) -> Member:
        return member if member.plan is None else replace(member, plan=planned(member.plan))

    base = None if members.base is None else other(members.base)
    return replace(members, models=[other(m) for m in members.models], base=base)


def _voices(members: Members) -> list[tuple[Member, float]]:
    """Whom a merge should be near to, with their shares: those of the merge where its weights are shares, else equal
    ones. Who is subtracted is not among them; where all are (task vectors taken away), the base is. All of a
    joined head."""
    if members.first.joined is not None:  # each is right about its own classes
        return [(m, 1 / len(members.models)) for m in members.models]
    weights = members.weights()
    kept = [(m, w) for m, w in zip(members.models, weights, strict=True) if w > 0 or not any(weights)]
    if not kept:
        return [(members.base or members.models[0], 1.0)]
    if members.settings.method.weights != "shares" or not any(weights):
        kept = [(m, 1.0) for m, _ in kept]
    return [(m, w / sum(w for _, w in kept)) for m, w in kept]
