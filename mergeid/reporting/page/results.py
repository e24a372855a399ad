"""From what one verb returned to a page about it."""

from __future__ import annotations

import hashlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mergeid.reporting.page.content import FileRecord, Report
from mergeid.results.barrier import BarrierResult
from mergeid.results.merge import MergeResult
from mergeid.results.plan import Plan
from mergeid.results.prediction import PredictResult

LIBRARIES = ("mergeid", "torch", "timm", "transformers")
"""What a page names the versions of."""


def report_of(result: Plan | PredictResult | BarrierResult | MergeResult, models: Sequence[str]) -> Report:
    """A page about one result; `models`: as the user named them, the first two are A and B."""
    a, b = models[0], models[1] if len(models) > 1 else ""
    about = Report(a, b, command=command_line(), versions=versions())
    if isinstance(result, MergeResult):
        plan = result.plan
        return replace(
            about,
            arch=plan.arch if plan is not None else "",
            plan=plan,
            merge=result,
            inputs=_paths("model", models),
            written=file_records("written", [f for f in result.files if f.is_file()]),
            notes=tuple(result.notes),
        )
    if isinstance(result, BarrierResult):
        return replace(about, curves=(*result.beside, result))
    if isinstance(result, PredictResult):
        return replace(about, arch=result.arch, prediction=result, notes=tuple(result.notes))
    return replace(about, arch=result.arch, plan=result, seed=result.seed, notes=tuple(result.notes))


def command_line() -> str:
    """What was typed, where it was typed."""
    return shlex.join(["mergeid", *sys.argv[1:]]) if Path(sys.argv[0]).stem in ("mergeid", "__main__") else ""


def versions() -> dict[str, str]:
    """Of the libraries that a result may depend on."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def file_records(role: str, paths: Sequence[Path]) -> tuple[FileRecord, ...]:
    """Files with their hashes and sizes."""
    found = []
    for path in paths:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        found.append(FileRecord(role, str(path), digest.hexdigest(), path.stat().st_size))
    return tuple(found)


def _paths(role: str, models: Sequence[str]) -> tuple[FileRecord, ...]:
    """The weight files of models that lie on this machine."""
    files = [f for m in models for f in ([Path(m)] if Path(m).is_file() else sorted(Path(m).glob("*.safetensors")))]
    return file_records(role, files)
