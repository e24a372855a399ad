"""Plans that ``mergeid plan --output`` wrote, as they are read again."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mergeid.basics.reading import read_json

if TYPE_CHECKING:
    from mergeid.io.written import PlanFile


def read_plan(path: str | os.PathLike[str]) -> PlanFile:
    """What a plan's file says. Raises `MergeidError` where it is none."""
    from mergeid.io.schema import validated  # pydantic takes its time
    from mergeid.io.written import PlanFile

    file = os.fspath(path)
    return validated(PlanFile, read_json(file, "a plan that mergeid plan --output wrote"), file)


def heads_of(path: str | os.PathLike[str] | None) -> str | None:
    """What a plan was told of its models' heads; None: nothing, or there is no plan."""
    return None if path is None else read_plan(path).settings.get("heads")
