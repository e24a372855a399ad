"""From what was decided to the merged checkpoint: what `merge_checkpoints` reads, and its record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid.combine.apply import merge_checkpoints
from mergeid.io.checkpoint import Checkpoint
from mergeid.methods.settings import MergeSettings
from mergeid.models.pair import Progress, Source, open_plain

if TYPE_CHECKING:
    from torch import Tensor

    from mergeid.stages.members import Members
    from mergeid.verbs.merge import MergeResult


@dataclass
class Inputs:
    """What `merge_checkpoints` reads: checkpoints, how their tensors are moved, and what was measured."""

    models: list[Checkpoint]
    base: Checkpoint | None
    transforms: list[Callable[[str, Tensor], Tensor] | None]
    overrides: dict[str, Tensor]
    statistics: list[dict[str, Any]] | None

    @classmethod
    def of(
        cls,
        models: Sequence[Source],
        base: Source | None,
        members: Members | None,
        repaired: Mapping[str, Tensor],
        allow_pickle: bool,
    ) -> Inputs:
        given = [*models, *([base] if base is not None else [])]
        if members is None:
            opened = open_plain(given, allow_pickle)
            last = opened.pop() if base is not None else None
            return cls(opened, last, [None] * len(given), {}, None)
        everyone = [*members.models, *([members.base] if members.base is not None else [])]
        found = [m.loaded.checkpoint for m in everyone]
        checkpoints = [c for c in found if c is not None]
        if len(checkpoints) < len(given):
            checkpoints = open_plain(given, allow_pickle)
        first, names = checkpoints[0], members.first.names
        statistics = None
        if members.statistics is not None:
            statistics = [{n: s[k] for n, k in names.items() if k in s} for s in members.statistics]
        last = checkpoints.pop() if base is not None else None
        return cls(
            checkpoints,
            last,
            [_transform(m) for m in everyone],
            {n: repaired[k].to(first.tensor(n).dtype) for n, k in names.items() if k in repaired and n in first.table},
            statistics,
        )


def _transform(member: Any) -> Callable[[str, Tensor], Tensor] | None:
    """How the tensors of a member's checkpoint are permuted; None where nothing moves."""
    made = member.plan
    if made is None or not made.moves:
        return None
    files = made.graph.renamed({k: n for n, k in member.loaded.names.items()})
    element = made.element

    def transform(name: str, value: Tensor) -> Tensor:
        return files.apply(element, name, value)

    return transform


def write(
    result: MergeResult,
    inputs: Inputs,
    target: Path,
    settings: MergeSettings,
    dtype: str | None,
    skip: Sequence[str],
    force: bool,
    progress: Progress | None,
    configs: Mapping[str, Any],
) -> MergeResult:
    """Write the merge and its record; the result gets the files and the report. `configs`: what the record says of
    configs that differed."""
    from mergeid.combine.asymmetric import note

    record = {
        "verdict": result.verdict,
        **configs,
        "plan": result.plan.to_json() if result.plan else None,
        "repaired": result.repaired,
        **({"repair": result.repair} if result.repair else {}),
        **({"comparison": result.comparison} if result.comparison else {}),
        **({"further_plans": [p.to_json() for p in result.plans[1:]]} if result.plans[1:] else {}),
    }
    tell = (lambda done, total: progress("writing", done, total)) if progress else None
    report = merge_checkpoints(
        inputs.models[0],
        inputs.models[1] if inputs.models[1:] else None,
        target,
        more=inputs.models[2:],
        base=inputs.base,
        weights=settings.weights,
        normalize=settings.normalize,
        method=settings.method.name,
        parameters=settings.parameters,
        seed=settings.seed,
        transform_b=inputs.transforms[1] if inputs.models[1:] else None,
        transforms=inputs.transforms[min(2, len(inputs.models)) :],
        statistics=inputs.statistics,
        overrides=inputs.overrides,
        dtype=dtype,
        skip=skip,
        force=force,
        record=record,
        progress=tell,
    )
    result.files = list(report.files)
    result.notes += note(report.overridden)
    result.report = report.to_json()
    return result
