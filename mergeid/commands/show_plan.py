"""The table of a plan: for every space the decision and the evidence in numbers."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich.text import Text

from mergeid.report.tables import Column, make_table, number

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from rich.console import Console

    from mergeid.api import MergeResult
    from mergeid.identify.decide import SpaceEvidence
    from mergeid.identify.layers import SpaceRecord
    from mergeid.planning import Plan

STYLES = {"direct": "green", "match": "yellow", "will not merge": "red"}
MEANING = {
    "direct": "merge directly: no space gains from another order of B's neurons",
    "match": "match first: average only after permuting B's neurons into A's order",
    "will not merge": "will not merge: most of the two networks corresponds under no assignment",
}


ASKED = {
    "always": "every space is matched, as asked with --match always",
    "never": "B's neurons are taken as they lie, as asked with --match never",
}
LEGEND = (
    "J: mean correlation of paired neurons as they lie, matched, at random. ι: 1 where the neurons correspond as they "
    "lie, 0 where no better than at random. chord: how far the next layer's output is off the average of the "
    "two. moved: neurons that trade places."
)
LEGEND_WEIGHTS = (
    "gain: by how much the match fits unseen weights better than the order as it is, in standard deviations of a "
    "random permutation. moved: neurons that trade places."
)
LEGEND_STRUCTURE = (
    "structure: the least that it costs, in squared weights, to train what both models share (the base, or the stored "
    "fixed parts) into another order's functions. Above 0 in both, it alone keeps the neurons in place. no: another "
    "order is as cheap; in brackets, by how much it is dearer."
)
REMARKS = {
    "taken_from_a": "Integer tensors that differ, taken from A",
    "skipped": "Skipped, taken from A as they are",
    "left_out": "Only in B, left out",
    "dtypes": "Written in another number format than A's",
}


def print_plan(plan: Plan, console: Console) -> None:
    """The table, what its columns mean, the verdict and the notes."""
    if plan.spaces:
        numbers = any(s.j_identity is not None for s in plan.spaces)
        columns, rows = _with_numbers(plan) if numbers else _without_data(plan)
        title = f"{len(rows)} spaces of {plan.arch}, judged by {plan.evidence}"
        console.print(make_table(columns, rows, width=console.width, title=title))
        console.print(LEGEND if numbers else LEGEND_WEIGHTS, style="dim")
        for line in structure_lines(plan):
            console.print(line, markup=False)
    for line in verdict_lines(plan):
        console.print(line, markup=False)


def _with_numbers(plan: Plan) -> tuple[list[Column], list[Sequence[Any]]]:
    columns = [
        Column("id", optional=3),
        Column("space", shrink=True, min_width=10),
        Column("size", "right", optional=2),
        Column("decision"),
        Column("moved", "right"),
        Column("J as is", "right"),
        Column("J match", "right"),
        Column("J random", "right", optional=4),
        Column("ι [95 %]", "right"),
        Column("chord as is", "right", optional=5),
        Column("chord match", "right", optional=5),
    ]
    structural = any(s.structure is not None for s in plan.spaces)
    if structural:
        columns.append(Column("structure", "right"))
    rows: list[Sequence[Any]] = [
        [
            s.id,
            s.label,
            f"{s.size:,}",
            _decision(s),
            f"{s.moved:,}",
            fixed(s.j_identity),
            fixed(s.j_match),
            fixed(s.j_random),
            interval(s.iota, s.iota_low, s.iota_high),
            fixed(s.chord_identity),
            fixed(s.chord_match),
            *([structure_cell(s.structure)] if structural else []),
        ]
        for s in plan.spaces
    ]
    return columns, rows


def _without_data(plan: Plan) -> tuple[list[Column], list[Sequence[Any]]]:
    columns = [
        Column("id", optional=2),
        Column("space", shrink=True, min_width=14),
        Column("size", "right"),
        Column("decision"),
        Column("moved", "right"),
        Column("gain (σ)", "right"),
    ]
    rows: list[Sequence[Any]] = [
        [s.id, s.label, f"{s.size:,}", _decision(s), f"{s.moved:,}", number(s.gain, 1)] for s in plan.spaces
    ]
    return columns, rows


def _decision(space: SpaceEvidence) -> Text:
    return Text(space.decision, style=STYLES.get(space.decision, ""))


def structure_cell(record: SpaceRecord | None) -> str:
    """``0.83`` where identified, ``no (−0.12)`` where not; a dash where no layer makes the space."""
    if record is None:
        return number(None)
    if record.identifiable:
        return short(min(record.a.margin, record.b.margin))
    return f"no ({short(min(record.a.margin, record.b.margin))})"


def short(value: float) -> str:
    """Two digits; ∞ where no other order can be reached."""
    return f"{value:.2g}".replace("inf", "∞").replace("-", "−")


def structure_lines(plan: Plan) -> list[str]:
    """How many spaces are identified by structure, the weakest ones, and what was left out; nothing without records."""
    with_record = [s for s in plan.spaces if s.structure is not None]
    if not with_record:
        return []
    lines = [LEGEND_STRUCTURE]
    lost = [s for s in with_record if s.structure is not None and not s.structure.identifiable]
    text = f"Identified by structure: {len(with_record) - len(lost)} of {len(with_record)} spaces"
    said = []
    for space in lost[:3]:
        assert space.structure is not None
        worst, name = min(((space.structure.a, "A"), (space.structure.b, "B")), key=lambda x: x[0].margin)
        said.append(f"{space.label}: cheapest swap {short(worst.least_swap)} in {name}")
    if said:
        text += f". Not identified: {'; '.join(said)}" + (f"; and {len(lost) - 3} more" if len(lost) > 3 else "")
    lines.append(text + ".")
    if "stability" in (left := plan.structure.get("left_out", {})):
        lines.append(f"Left out: {left['stability']}.")
    return lines


def print_merge(result: MergeResult, console: Console) -> None:
    """What was decided and where everything lies."""
    if result.verdict == "transported":
        console.print("OT fusion: neurons were carried onto A's by optimal transport.")
        for note in result.notes:
            console.print(f"Note: {note}", markup=False)
    elif result.plan is None:
        console.print("Plain merge: B's neurons were taken as they lie.")
    elif len(result.plans) < 2:
        looked = result.comparison
        overruled = looked is not None and looked["chosen"] != looked["planned"]
        for line in verdict_lines(
            result.plan, result.notes, "Planned, before the last look" if overruled else "Verdict"
        ):
            console.print(line, markup=False)
    else:
        for plan in result.plans:
            console.print(f"{plan.b}: {verdict_lines(plan, [])[0]}", markup=False)
        for note in result.notes:
            console.print(f"Note: {note}", markup=False)
    if result.comparison:
        console.print(comparison_line(result.comparison), markup=False)
    if result.repair:
        console.print(repair_line(result.repair), markup=False)
    report = result.report
    for key, meaning in REMARKS.items():
        if names := report.get(key):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            console.print(f"{meaning}: {next(iter(names))}{more}.", markup=False)
    for file in result.files:
        console.print(f"wrote {file}", markup=False, soft_wrap=True)


def comparison_line(comparison: dict[str, Any]) -> str:
    """How far the merge is from the models, beside those that were not chosen."""
    from mergeid.comparing import label, shown

    def figure(value: float | None) -> str:
        return "not finite" if value is None else shown(value)

    unit = {
        "nats": " nats farther from the models' predictions than they are themselves",
        "relative": " of the outputs' variance away from the models",
        "both": " (mean of all outputs) away from the models",
    }[comparison["unit"]]
    own = label(comparison["chosen"], comparison["repair"])
    found = dict(comparison["distances"])
    text = f"The merge ({own}) is {figure(found.pop(own))}{unit}, on {comparison['examples']} calibration examples"
    rest = ", ".join(f"{name} {figure(value)}" for name, value in found.items())
    return text + (f"; not chosen: {rest}." if rest else ".")


def repair_line(repair: dict[str, Any]) -> str:
    """What the repair stage did, with the spread of activations before and after."""
    before, after = (f"{repair[key]:.2f}" for key in ("spread_before", "spread_after"))
    if repair["kind"] == "bn":
        return (
            f"BatchNorm statistics were re-estimated on the calibration data ({repair['layers']} layers, "
            f"{repair['examples']} examples): activations had {before} of the spread that they expect, now {after}."
        )
    also = ", then BatchNorm statistics were re-estimated" if repair["kind"] == "repair+bn" else ""
    return (
        f"REPAIR: pre-activations of {repair['layers']} layers were rescaled on {repair['examples']} examples"
        f"{also}; they had {before} of the models' own average spread, now {after}."
    )


def fixed(value: float | None) -> str:
    """A number with two decimals, without a negative zero; a dash where nothing was measured."""
    return number(None) if value is None else f"{round(value, 2) + 0.0:.2f}"


def interval(value: float | None, low: float | None, high: float | None) -> str:
    """``0.31 [0.25, 0.36]``; a dash where nothing was measured."""
    if value is None:
        return number(None)
    ends = f" [{fixed(low)}, {fixed(high)}]" if low is not None and high is not None else ""
    return fixed(value) + ends


def verdict_lines(plan: Plan, notes: Sequence[str] | None = None, what: str = "Verdict") -> list[str]:
    """The verdict in a sentence, how the spaces were decided, and the notes."""
    counts = Counter(s.decision for s in plan.spaces)
    shown = ", ".join(f"{n} {decision}" for decision, n in counts.most_common())
    meaning = ASKED.get(plan.match) or MEANING.get(plan.verdict, plan.verdict)
    lines = [f"{what}: {meaning}" + (f" ({shown})." if shown else ".")]
    return lines + [f"Note: {note}" for note in (plan.notes if notes is None else notes)]
