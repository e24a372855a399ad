"""What a page shows: results of the verbs and measured values, nothing that is made up for the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergeid.results.barrier import BarrierResult
    from mergeid.results.merge import MergeResult
    from mergeid.results.plan import Plan
    from mergeid.results.prediction import PredictResult


@dataclass(frozen=True)
class Measured:
    """One merged network, measured on the labelled examples.

    Attributes:
        name: "solved". loss: in nats. accuracy: 0 to 1; None where the task has none.
    """

    name: str
    loss: float
    accuracy: float | None


@dataclass(frozen=True)
class FileRecord:
    """A file that was read or written.

    Attributes:
        role: "model A", "merged". sha256: hexadecimal. size: in bytes.
    """

    role: str
    path: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Report:
    """Everything that one page tells; what is None or empty is left out.

    Attributes:
        a, b: names of the models. arch: their architecture.
        curves: loss from A to B, by label: "direct", "matched", each also with ", repaired".
        solved: networks off the straight line between A and B.
        refused: why the merge that was tried will not work.
        data, calibration: what was measured on, and matched on.
        command: what makes this page again. next_command: what makes the best merge.
        seconds: wall time in all. versions: library to version.
    """

    a: str
    b: str
    arch: str = ""
    plan: Plan | None = None
    curves: tuple[BarrierResult, ...] = ()
    solved: tuple[Measured, ...] = ()
    prediction: PredictResult | None = None
    merge: MergeResult | None = None
    refused: str | None = None
    inputs: tuple[FileRecord, ...] = ()
    written: tuple[FileRecord, ...] = ()
    data: str = ""
    calibration: str = ""
    command: str = ""
    next_command: str = ""
    seconds: float = 0.0
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
