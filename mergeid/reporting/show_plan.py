"""The table of a plan: for every space the decision and the evidence in numbers."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich.text import Text

from mergeid.evidence.anchored import IDENTIFIED, IF_INPUTS, NOT
from mergeid.reporting.tables import Column, make_table, number, percent

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from rich.console import Console

    from mergeid.evidence.anchored import Certificate
    from mergeid.evidence.decide import SpaceEvidence
    from mergeid.evidence.layers import SpaceRecord
    from mergeid.results.plan import Plan

STYLES = {"direct": "green", "match": "yellow", "will not merge": "red"}
MEANING = {
    "direct": "merge directly: no space gains from permuting B's neurons",
    "match": "match first: average only after permuting B's neurons into A's order",
    "will not merge": "will not merge: no permutation makes most of their neurons correspond",
}


ASKED = {
    "always": "every space is matched, as requested by --match always",
    "never": "B's neurons are taken as is, as requested by --match never",
}
LEGEND = (
    "J: mean correlation of paired neurons, as is and matched. ι: 1 where the neurons correspond as is, 0 where they "
    "correspond no better than at random. moved: neurons that change position."
)
LEGEND_MORE = (
    " J random: the same correlation for random pairs. chord: how far the next layer's output is from the average of "
    "the two networks' outputs."
)
DETAILS = ("id", "J random", "chord as is", "chord match")
"""Columns that only --verbose shows."""
LEGEND_WEIGHTS = (
    "gain: how much of the moved neurons' similarity in weights comes from the match; above 100 % where the current "
    "order pairs opposites. moved: neurons that change position."
)
LEGEND_STRUCTURE = (
    "structure: how much more it costs, in squared weights, to train another order's functions from what both models "
    "share (the base, or the stored fixed parts). no: another order costs no more; the difference is in brackets."
)
LEGEND_ANGLE = (
    "angle: the widest, in either model, between the difference of two neurons' weights and the difference of their "
    "fixed parts. Below 45° in both models, no swap brings B's neurons nearer to A's."
)
LEGEND_RADII = (
    "ε*: how far the covariance Σ of the layer's inputs may shift (spectral norm) before another order of its neurons "
    "could fit the fixed part as well; the smaller value of A and B. g: the eigengap after Σ's leading directions. "
    "0: no certificate. A dash: no bound is known, because a BatchNorm leaves the scale free."
)
LEGEND_SOLVED = (
    "averaged, solved: how far the layer's outputs are from the models' own on inputs that it was not solved on, as a "
    "share of their variance."
)


def print_plan(plan: Plan, console: Console, *, verbose: bool = False) -> None:
    """The table, what its columns mean, the verdict and the notes; `verbose`: all columns."""
    if plan.spaces:
        numbers = any(s.j_identity is not None for s in plan.spaces)
        columns, rows = _with_numbers(plan, verbose) if numbers else _without_data(plan)
        title = f"{len(rows)} spaces of {plan.arch}, judged by {plan.evidence}"
        console.print(make_table(columns, rows, width=console.width, title=title))
        console.print(
            (LEGEND + LEGEND_MORE * verbose)
            if numbers
            else LEGEND_WEIGHTS
            if plan.evidence == "weights"
            else LEGEND_ANGLE,
            style="dim",
        )
        for line in structure_lines(plan):
            console.print(line, markup=False)
        print_radii(plan, console)
        print_solved(plan, console)
    for line in verdict_lines(plan):
        console.print(line, markup=False)


def _with_numbers(plan: Plan, verbose: bool) -> tuple[list[Column], list[Sequence[Any]]]:
    columns = [
        Column("id", optional=6),
        Column("space", shrink=True, min_width=14),
        Column("size", "right", optional=4),
        Column("decision"),
        Column("moved", "right", optional=2),
        Column("J as is", "right", optional=3),
        Column("J match", "right"),
        Column("J random", "right", optional=7),
        Column("ι", "right"),
        Column("95 % interval", "right", optional=5),
        Column("chord as is", "right", optional=8),
        Column("chord match", "right", optional=8),
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
            fixed(s.iota),
            interval(s.iota_low, s.iota_high),
            fixed(s.chord_identity),
            fixed(s.chord_match),
            *([structure_cell(s.structure)] if structural else []),
        ]
        for s in plan.spaces
    ]
    if verbose:
        return columns, rows
    kept = [i for i, c in enumerate(columns) if c.header not in DETAILS]
    return [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _without_data(plan: Plan) -> tuple[list[Column], list[Sequence[Any]]]:
    columns = [
        Column("id", optional=2),
        Column("space", shrink=True, min_width=14),
        Column("size", "right"),
        Column("decision"),
    ]
    if plan.evidence == "structure":
        columns.append(Column("angle", "right"))
        return columns, [[s.id, s.label, f"{s.size:,}", _decision(s), angle_cell(s.certificate)] for s in plan.spaces]
    columns += [Column("moved", "right"), Column("gain", "right")]
    gains = [number(None) if s.gain is None else f"{100 * s.gain:.0f} %" for s in plan.spaces]
    rows: list[Sequence[Any]] = [
        [s.id, s.label, f"{s.size:,}", _decision(s), f"{s.moved:,}", gain]
        for s, gain in zip(plan.spaces, gains, strict=True)
    ]
    return columns, rows


def angle_cell(certificate: Certificate | None) -> str:
    """``12°``; a dash for a space that follows the ones it lies in."""
    if certificate is None or certificate.angle_a is None or certificate.angle_b is None:
        return number(None)
    return f"{max(certificate.angle_a, certificate.angle_b):.0f}°"


def print_radii(plan: Plan, console: Console) -> None:
    """The table of `radii`, where they were computed (--certify)."""
    if plan.structure.get("certified"):
        columns, rows = radii(plan)
        title = "Certified shifts of the inputs, layer by layer"
        console.print(make_table(columns, rows, width=console.width, title=title))
        console.print(LEGEND_RADII, style="dim")


def radii(plan: Plan) -> tuple[list[Column], list[Sequence[Any]]]:
    """ε*, ε*/g and ε*/‖Σ‖ of every layer that makes a space."""
    columns = [
        Column("layer", shrink=True, min_width=12),
        Column("space", optional=1),
        *(Column(name, "right") for name in ("ε*", "ε*/g", "ε*/‖Σ‖")),
    ]
    rows: list[Sequence[Any]] = []
    for space in plan.spaces:
        for layer in space.structure.layers if space.structure else ():
            sides = (layer.a, layer.b)
            values = [[getattr(side, name) for side in sides] for name in ("radius", "by_gap", "by_norm")]
            rows.append([layer.layer, space.id, *(number(None) if None in v else short(min(v)) for v in values)])
    return columns, rows


def print_solved(plan: Plan, console: Console) -> None:
    """What solving would change, layer by layer, where that was asked for (--solve)."""
    if plan.solved:
        columns = [Column("layer", shrink=True, min_width=12), *(Column(n, "right") for n in ("averaged", "solved"))]
        rows = [[_layer(s.weights), percent(s.before), percent(s.after)] for s in plan.solved]
        console.print(make_table(columns, rows, width=console.width, title="What solving would change"))
        console.print(LEGEND_SOLVED, style="dim")


def _layer(names: Sequence[str]) -> str:
    """The module that they are of, or their names."""
    modules = dict.fromkeys(name.rpartition(".")[0] for name in names)
    return ", ".join(m or name for m, name in zip(modules, names, strict=False))


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
    """How many spaces are identified by structure, where the chain from the inputs breaks, which are not held and why,
    and what was left out; nothing where no fixed part is known."""
    known = {s.id: s for s in plan.spaces if s.certificate is not None}
    if not known:
        return []
    lines = [LEGEND_STRUCTURE] if any(s.structure is not None for s in plan.spaces) else []
    says: dict[str, list[Certificate]] = {}
    for space in known.values():
        assert space.certificate is not None
        says.setdefault(space.certificate.says, []).append(space.certificate)
    lines.append(f"Identified by structure: {len(says.get(IDENTIFIED, []))} of {len(known)} spaces.")
    if conditional := says.get(IF_INPUTS):
        breaks = Counter(i for c in conditional for i in c.breaks)
        where = "; ".join(
            f"{known[i].label} ({c.gap})" for i, _ in breaks.most_common(3) if (c := known[i].certificate)
        )
        lines.append(
            f"Identified if the inputs correspond: {len(conditional)}. The chain from the inputs breaks at {where}."
        )
    if lost := says.get(NOT):
        said = "; ".join(f"{known[c.space].label}: {c.why}" for c in lost[:3])
        more = f"; and {len(lost) - 3} more" if len(lost) > 3 else ""
        lines.append(f"Not identified: {len(lost)}. {said}{more}.")
    if "stability" in (left := plan.structure.get("left_out", {})):
        lines.append(f"Left out: {left['stability']}.")
    return lines


def fixed(value: float | None) -> str:
    """A number with two decimals, without a negative zero; a dash where nothing was measured."""
    return number(None) if value is None else f"{round(value, 2) + 0.0:.2f}"


def interval(low: float | None, high: float | None) -> str:
    """``0.25 to 0.36``; a dash where nothing was measured."""
    return number(None) if low is None or high is None else f"{fixed(low)} to {fixed(high)}"


def verdict_lines(plan: Plan, notes: Sequence[str] | None = None, what: str = "Verdict") -> list[str]:
    """The verdict in a sentence, how the spaces were decided, and the notes."""
    counts = Counter(s.decision for s in plan.spaces)
    shown = ", ".join(f"{n} {decision}" for decision, n in counts.most_common())
    meaning = ASKED.get(plan.match) or MEANING.get(plan.verdict, plan.verdict)
    lines = [f"{what}: {meaning}" + (f" ({shown})." if shown else ".")]
    if plan.turns:
        turned = sum(turn.turned for turn in plan.turns)
        lines.append(
            f"Inside attention heads, {turned} orthogonal maps align B's queries, keys and values with A's, without "
            f"changing what B computes."
        )
    return lines + [f"Note: {note}" for note in (plan.notes if notes is None else notes)]
