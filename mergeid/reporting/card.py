"""The model card of a merge: what the hub reads of it, and what people should know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeid.reporting.show_merge import comparison_line, repair_line
from mergeid.reporting.show_plan import verdict_lines

if TYPE_CHECKING:
    from mergeid.results.merge import MergeResult

SPACES = 40
"""Rows of the table of decisions."""


@dataclass(frozen=True)
class Origin:
    """What a merge was made of.

    Attributes:
        models: as the user named them, the base not among them.
        base: what they were fine-tuned from; None: not given.
        on_hub: those of all that are ids on the hub.
        method: how they were merged.
        library: what loads the result, in the hub's vocabulary; None: not known.
    """

    models: Sequence[str]
    base: str | None
    on_hub: Sequence[str]
    method: str
    library: str | None


def model_card(name: str, result: MergeResult, origin: Origin, plot: str | None = None) -> str:
    """A README.md in Markdown, with the hub's metadata in front.

    Args:
        name: of the repository.
        plot: name of a picture of the evidence that lies beside it.
    """
    from huggingface_hub import ModelCardData

    more: dict[str, Any] = {"base_model_relation": "merge"} if origin.on_hub else {}
    data = ModelCardData(
        base_model=list(origin.on_hub) or None,
        library_name=origin.library,
        tags=["merge", "mergeid"],
        **more,
    )
    made = f"A merge ({origin.method}) of {' and '.join(f'`{m}`' for m in origin.models)}"
    made += f", fine-tuned from `{origin.base}`" if origin.base else ""
    lines = [f"# {name.rpartition('/')[2]}", "", f"{made}, made with mergeid.", ""]
    if result.comparison:
        lines += [comparison_line(result.comparison), ""]
    if result.repair:
        lines += [repair_line(result.repair), ""]
    lines += [f"- {note}" for note in result.notes] + [""] * bool(result.notes)
    for plan in result.plans:
        lines += [f"## Plan for `{plan.b}`", "", verdict_lines(plan, [])[0], ""]
        lines += ["| neurons | number | decision |", "|---|---:|---|"]
        lines += [f"| {s.label} | {s.size} | {s.decision} |" for s in plan.spaces[:SPACES]]
        lines += [f"| … and {len(plan.spaces) - SPACES} more | | |"] if len(plan.spaces) > SPACES else []
        lines += [""]
    if plot is not None:
        lines += [f"![Evidence by depth]({plot})", ""]
    lines += ["`mergeid.json` holds the whole record: inputs with their SHA-256, settings, plan, seeds and versions."]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"
