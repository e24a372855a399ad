"""``plan --estimate``: memory, disk and time of a merge before it starts, from the headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergeid.io.opening import Source
from mergeid.models.workbench import Workbench
from mergeid.request.boundary import verb
from mergeid.request.request import Reading, Run
from mergeid.stages.open import open_models

if TYPE_CHECKING:
    from mergeid.results.estimate import Estimate


@verb
def estimate(
    a: Source,
    b: Source,
    *more: Source,
    base: Source | None = None,
    skip: Sequence[str] = (),
    config: str | None = None,
) -> Estimate:
    """Memory, disk space and time that a merge of these models would take; only the headers of their files are read.

    Args:
        a, b, more: files, folders or hub ids.
        base: the model that they were fine-tuned from, for methods that use it.
        skip: globs of tensor names that are taken from A as they are.
        config: "a" or "b": whose config counts where they differ.

    Raises `MergeidError` for models that do not fit.
    """
    from mergeid.stages.estimate import estimate_merge

    met = open_models(Workbench(Reading(config=config, skip=tuple(skip)), Run()), [a, b, *more], base)
    return estimate_merge(met, Path())
