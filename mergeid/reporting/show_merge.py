"""What a merge did, in a few lines. Needs neither torch nor what plans are made with, unless there is a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from rich.console import Console

    from mergeid.results.merge import MergeResult

REMARKS = {
    "taken_from_a": "Integer tensors that differ, taken from A",
    "skipped": "Skipped, taken from A as is",
    "left_out": "Only in B, left out",
    "dtypes": "Written in another dtype than A's",
}


def print_merge(result: MergeResult, console: Console) -> None:
    """What was decided and where everything is."""
    if result.verdict == "transported":
        console.print("OT fusion: B's neurons were mapped onto A's by optimal transport.")
        for note in result.notes:
            console.print(f"Note: {note}", markup=False)
    elif result.plan is None:
        taken = "the neurons are in the same order" if result.in_place else "B's neurons were taken as is"
        console.print(f"{'Merged directly' if result.in_place else 'Plain merge'}: {taken}.")
        for note in result.notes:
            console.print(f"Note: {note}", markup=False)
    elif len(result.plans) < 2:
        from mergeid.reporting.show_plan import print_radii, verdict_lines

        looked = result.comparison
        overruled = looked is not None and looked["chosen"] != looked["planned"]
        for line in verdict_lines(
            result.plan, result.notes, "Plan, overruled by the last look" if overruled else "Verdict"
        ):
            console.print(line, markup=False)
        print_radii(result.plan, console)
    else:
        from mergeid.reporting.show_plan import verdict_lines

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


def comparison_line(comparison: Mapping[str, Any]) -> str:
    """How far the merge is from the models, beside those that were not chosen."""
    from mergeid.results.comparison import label, shown

    def figure(value: float | None) -> str:
        return "not finite" if value is None else shown(value)

    unit = {
        "nats": " nats from the models' own predictions",
        "relative": " of the outputs' variance away from the models' outputs",
        "both": " (mean of all outputs) away from the models' outputs",
    }[comparison["unit"]]
    own = label(comparison["chosen"], comparison["repair"])
    found = dict(comparison["distances"])
    text = f"Chosen: {own}, {figure(found.pop(own))}{unit} on {comparison['examples']} calibration examples"
    rest = ", ".join(f"{name} {figure(value)}" for name, value in found.items())
    return text + (f" (others: {rest})." if rest else ".")


def repair_line(repair: Mapping[str, Any]) -> str:
    """What the repair stage did, with the spread of activations (or the layers' error) before and after."""
    if repair["kind"].startswith("solve"):
        before, after = (f"{repair[key]:.0%}" for key in ("error_before", "error_after"))
        polished = (
            f" Then distilled: the distance from the models' mixed predictions fell from "
            f"{repair['distance_before']:.3f} to {repair['distance_after']:.3f}."
            if "distance_after" in repair
            else ""
        )
        lean = repair.get("leans_to")
        target = "a mean that leans to one model" if lean else "the models' mean"
        why = f" All layers but the last lean to {lean}." if lean else ""
        return (
            f"Solved layer by layer: {repair['layers']} layers were refitted on {repair['examples']} examples. On "
            f"held-out examples their outputs are off {target} by {after} of its spread ({before} before)."
            + why
            + polished
        )
    if repair["kind"] == "regmean":
        return (
            f"RegMean: {repair['layers']} linear layers were fitted to what each model answers on its own inputs, by "
            f"{repair['examples']} examples."
        )
    before, after = (f"{repair[key]:.2f}" for key in ("spread_before", "spread_after"))
    if repair["kind"] == "bn":
        return (
            f"BatchNorm statistics were re-estimated on the calibration data ({repair['layers']} layers, "
            f"{repair['examples']} examples): activations had {before} of the expected spread, now {after}."
        )
    also = ", then BatchNorm statistics were re-estimated" if repair["kind"] == "repair+bn" else ""
    return (
        f"REPAIR: pre-activations of {repair['layers']} layers were rescaled on {repair['examples']} examples"
        f"{also}; they had {before} of the models' own average spread, now {after}."
    )
