"""Match: every further model, and the base, planned against the first."""

from __future__ import annotations

from mergeid.errors import NoModel, WillNotMerge
from mergeid.methods.settings import MergeSettings
from mergeid.request.request import Calibration, Matching, Output
from mergeid.results.plan import Plan
from mergeid.stages.common_order import common_order
from mergeid.stages.members import Member, Members
from mergeid.stages.open import Met, pair_of
from mergeid.stages.plan import plan_of


def planned_members(
    met: Met, settings: MergeSettings, matching: Matching, calibration: Calibration, output: Output
) -> Members:
    """The models of a merge, each with its plan against the first one.

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
        without = " (without --data)" if calibration.given else ""
        raise NoModel(
            f"{error}; or merge the tensors as they are with --match never{without}, which builds no model"
        ) from error
    first = pairs[0].a
    examples = bench.examples(calibration, first)
    elements = None
    if matching.matcher is not None and len(others) > 1:
        elements = common_order(pairs, matching.matcher, bench.run, examples)
    members = [Member(first)]
    for i, pair in enumerate(pairs):
        plan = plan_of(met, pair, others[i], matching, calibration, elements[i] if elements else None)
        members.append(Member(pair.b, plan))
        if plan.verdict == "will not merge" and not output.force:
            raise WillNotMerge(
                f"{first.source} and {pair.b.source} will not merge: {plan.notes[-1]}; nothing was written (--force "
                "merges them all the same)"
            )
    base = members.pop() if met.base is not None else None
    return Members(members, base, settings, examples)


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
