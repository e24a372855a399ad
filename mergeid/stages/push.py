"""Push: a merge that is written goes onto the hub, with a model card, its plan and a picture of the evidence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergeid.basics.stopping import TemporaryFolder
from mergeid.errors import MergeidError
from mergeid.io.hub import is_id
from mergeid.io.output import RECORD
from mergeid.io.push import push
from mergeid.plugins import config_owner
from mergeid.reporting.card import Origin, model_card

if TYPE_CHECKING:
    from mergeid.results.merge import MergeResult
    from mergeid.stages.open import Met

LIBRARIES = {"sentence_transformers": "sentence-transformers"}
"""Adapters that the hub's vocabulary calls otherwise."""


def push_merge(result: MergeResult, met: Met, method: str, repo: str) -> MergeResult:
    """The result, with a note of where it lies now. Raises `MergeidError` as `mergeid.io.push.push` does."""
    root = Path(str(result.report["output"]))
    models, base = [m.source for m in met.agreed.models], met.agreed.base
    named = [*models, *([base.source] if base is not None else [])]
    config = met.agreed.models[0].config
    owner = None if config is None else config_owner(config)
    library = None if owner is None else str(getattr(owner, "name", ""))
    on_hub = [source for source in dict.fromkeys(named) if is_id(source)]
    origin = Origin(
        models, None if base is None else base.source, on_hub, method, library and LIBRARIES.get(library, library)
    )
    inside = root if root.is_dir() else root.parent
    files: dict[str, Path | bytes] = {}
    for file in result.files:
        name = file.relative_to(inside).as_posix()
        files[RECORD if name.endswith(RECORD) else name] = file
    picture = _picture(result)
    if picture is not None:
        files["evidence.svg"] = picture
    card = model_card(repo, result, origin, "evidence.svg" if picture is not None else None)
    address = push(repo, {**files, "README.md": card.encode(errors="replace")}, "Merge made with mergeid")
    return replace(result, notes=[*result.notes, f"pushed to {address}"])


def _picture(result: MergeResult) -> bytes | None:
    """The evidence of the first plan; None where there is none."""
    if result.plan is None:
        return None
    from mergeid.reporting.evidence_plot import plot_evidence

    with TemporaryFolder() as folder:
        try:
            return plot_evidence(result.plan, Path(folder) / "evidence.svg").read_bytes()
        except MergeidError:
            return None
