"""Match: every further model, and the base, planned against the first."""

from __future__ import annotations

from dataclasses import replace

from mergeid.combine.in_place import InPlace
from mergeid.errors import NoModel, WillNotMerge
from mergeid.methods.settings import MergeSettings
from mergeid.request.request import Calibration, Matching, Output
from mergeid.results.plan import Plan
from mergeid.stages.common_order import common_order
from mergeid.stages.in_place import Places, on_astray
from mergeid.stages.members import Member, Members
from mergeid.stages.open import Met, Pair, pair_of
from mergeid.stages.plan import make_plan, plan_of


def planned_members(
    met: Met,
    settings: MergeSettings,
    matching: Matching,
    calibration: Calibration,
    output: Output,
    places: Places | None = None,
) -> Members:
    """The models of a merge, each with its plan against the first one.

    Args:
        places: what was seen of rows in place; then only the spaces are planned on which rows are astray.

    Raises:
        WillNotMerge: a plan says no, and the output is not forced.
        NoModel: no model can be built, which a plain merge does not need.
        MergeidError: anything wrong with the input.
    """
    bench, others = met.bench, met.everyone[1:]
    try:
        pairs = [pair_of(met, other, output.dtype) for other in others]
    except NoModel as error:
        if matching.mode != "auto" or settings.method.statistics:
            raise
        text, without = str(error), " (without --data)" if calibration.given else ""
        if "--match never" in text:  # it says so itself
            raise
        raise NoModel(
            f"{text}{' Or' if text.endswith('?') else '; or'} merge the tensors as is with --match never{without}, "
            "which builds no model"
        ) from error
    first = pairs[0].a
    examples = bench.examples(calibration, first)
    elements = None
    if matching.matcher is not None and len(others) > 1:
        elements = common_order(pairs, matching.matcher, bench.run, examples)
    members = [Member(first)]
    seen = list(places.found.values()) if places is not None and places.speaks else None
    for i, pair in enumerate(pairs):
        if seen is not None:
            plan = _plan_astray(met, pair, seen[i], matching)
        else:
            plan = plan_of(met, pair, others[i], matching, calibration, elements[i] if elements else None)
        members.append(Member(pair.b, plan))
        if plan.verdict == "will not merge" and not output.force:
            raise WillNotMerge(
                f"{first.source} and {pair.b.source} will not merge: {plan.notes[-1]}; nothing was written (--force "
                f"merges them anyway)"
            )
    base = members.pop() if met.base is not None else None
    return Members(members, base, settings, examples)


def _plan_astray(met: Met, pair: Pair, seen: InPlace, matching: Matching) -> Plan:
    """The plan of those spaces on which rows are astray."""
    small, note = on_astray(pair, seen)
    plan = make_plan(small, matching, met.bench.run)
    own = plan.notes if small.graph.spaces else []  # that nothing can be permuted is true of what is left only
    return replace(plan, notes=[*own, *([] if note is None else [note])])


def verdict_of(plans: list[Plan]) -> str:
    """The gravest of all."""
    verdicts = [plan.verdict for plan in plans]
    return next((v for v in ("will not merge", "match") if v in verdicts), "direct")


def notes_of(members: Members) -> list[str]:
    """The plans' notes, with the model's name where there are several."""
    several = len(members.plans) > 1
    return [
        f"{member.loaded.source}: {note}" if several else note
        for member in members.everyone
        if member.plan is not None
        for note in member.plan.notes
    ]
