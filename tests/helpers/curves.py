"""Barrier curves from states and keywords."""

from __future__ import annotations

from typing import Any

from torch import nn

from mergeid.evaluate.interpolate import LAMBDAS, Line, Measuring, Reestimate
from mergeid.evaluate.interpolate import barrier_curve as curve
from mergeid.models.examples import Examples
from mergeid.results.barrier import BarrierResult


def barrier_curve(
    state_a: Any,
    state_b: Any,
    model: nn.Module,
    dataset: Any,
    *,
    forward: Any,
    loss: Any,
    lambdas: Any = LAMBDAS,
    repair: bool = False,
    calibration: Any = None,
    calibration_batch: int | None = None,
    batch_size: int = 64,
    dtype: Any = None,
    mixed_precision: str | None = None,
    accelerator: Any = None,
    collate: Any = None,
    workers: int = 0,
    resume: Any = None,
    label: str = "",
    inplace: bool = False,
    progress: Any = None,
) -> BarrierResult:
    """`mergeid.evaluate.interpolate.barrier_curve` of what the keywords say."""
    held = None if calibration is None else Examples(calibration, collate)
    return curve(
        Line(state_a, state_b, model, forward, loss, lambdas, label),
        Examples(dataset, collate),
        Measuring(batch_size, dtype, mixed_precision, accelerator, workers),
        repair=Reestimate(held, calibration_batch) if repair else None,
        resume=resume,
        inplace=inplace,
        progress=progress,
    )
