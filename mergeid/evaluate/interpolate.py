"""The barrier between two networks, measured: loss and accuracy on the straight line from one to the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergeid.errors import MergeidError
from mergeid.evaluate.batches import Collate, dataset_length, input_dtype
from mergeid.evaluate.measure import Forward, Loss, Metrics, default_accelerator, evaluate
from mergeid.evaluate.result import BarrierResult
from mergeid.evaluate.resume import PointFile, digest_of
from mergeid.models.state import forget_derived
from mergeid.plugins import Batch
from mergeid.repair.batchnorm import batchnorm_layers, calibration_batches, reestimate_batchnorm

if TYPE_CHECKING:
    from accelerate import Accelerator

LAMBDAS = tuple(k / 10 for k in range(11))
MIXED_PRECISION = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def barrier_curve(
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    model: nn.Module,
    dataset: Any,
    *,
    forward: Forward,
    loss: Loss,
    lambdas: Sequence[float] = LAMBDAS,
    repair: bool = False,
    calibration: Any = None,
    calibration_batch: int | None = None,
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    mixed_precision: str | None = None,
    accelerator: Accelerator | None = None,
    collate: Collate | None = None,
    workers: int = 0,
    resume: Path | None = None,
    label: str = "",
    inplace: bool = False,
    progress: Callable[[float, Metrics], None] | None = None,
) -> BarrierResult:
    """Evaluates (1 − λ) a + λ b for every λ.

    The ends are exactly the two networks, and a pair with itself stays itself at every λ (`torch.lerp` in float64,
    rounded to the wider of the two stored dtypes, as a merge would write it). Integer and bool buffers come from a.

    Args:
        state_a: state dict with the model's keys. A key may be missing only where the model ties it to another one.
        state_b: likewise, already aligned to a.
        model: the network to load them into; left alone unless `inplace` (saves a copy of it).
        dataset: map-style, as for `evaluate`.
        forward: ``adapter.forward``.
        loss: `LossParts` of an output and a batch.
        lambdas: increasing, from 0 to 1.
        repair: re-estimate the BatchNorm statistics on `calibration` at every point, the ends included (so that a pair
            with itself keeps barrier 0); `mergeid.repair.batchnorm` says how.
        calibration: map-style data set, needed by `repair` where the model has BatchNorm.
        calibration_batch: runs all of `calibration` in batches of that size, exactly but in many passes. None takes as
            many of its examples as one batch can hold, in one pass.
        batch_size: examples per forward pass; for speed and memory only.
        dtype: evaluates in this dtype, interpolating without rounding to the stored one (``torch.float64``).
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``; by default the accelerator's.
        accelerator: process group and device; by default `accelerate.Accelerator()`.
        collate: list of items to batch; torch's default for None.
        workers: processes that load the data.
        resume: JSON file to which each finished point is added, and in which points of the same inputs are looked up.
        label: name of the curve in tables and plots.
        inplace: use `model` itself as the workspace.
        progress: called on every process after each point.

    Raises:
        MergeidError: λ without 0 and 1, states that do not fit the model, repair without calibration data, data that
            does not fit the model.
    """
    grid = _checked_grid(lambdas)
    _check_states(state_a, state_b, model)
    if mixed_precision not in (None, *MIXED_PRECISION):
        raise MergeidError(
            f"mixed precision {mixed_precision!r} is unknown; expected one of {', '.join(MIXED_PRECISION)}"
        )
    repair = repair and bool(batchnorm_layers(model))
    if repair and calibration is None:
        raise MergeidError(
            "re-estimating BatchNorm statistics needs calibration data; give some or switch the repair off"
        )
    accelerator = accelerator or default_accelerator()
    precision = mixed_precision or accelerator.mixed_precision
    task = [getattr(part, "__qualname__", type(part).__qualname__) for part in (forward, loss)]
    forward = _in_precision(forward, mixed_precision, accelerator)
    work = model if inplace else copy.deepcopy(model)
    work.eval().to(device=accelerator.device, dtype=dtype)
    arithmetic = {"forward": forward, "collate": collate, "accelerator": accelerator}
    if repair:
        batches = calibration_batches(work, calibration, size=calibration_batch, **arithmetic)

    points, file = {}, None
    if resume is not None:
        settings = {
            "model": type(model).__qualname__,
            "dtype": str(dtype),
            "precision": precision,
            "repair": repair and len(batches.dataset),
            "device": accelerator.device.type,
            "task": task,
        }
        digest = digest_of([state_a, state_b], [dataset, calibration if repair else None], settings)
        file = PointFile(resume, digest, accelerator)
        points = file.load()
    for x in grid:
        if x not in points:
            load_between(work, state_a, state_b, x, keep_precision=dtype is not None)
            if repair:
                reestimate_batchnorm(work, batches, forward=forward, accelerator=accelerator)
            points[x] = evaluate(work, dataset, loss=loss, batch_size=batch_size, workers=workers, **arithmetic)
            if file:
                file.add(x, points[x])
        if progress:
            progress(x, points[x])
    return _result(
        [points[x] for x in grid],
        lambdas=grid,
        repair=repair,
        calibration=dataset_length(batches.dataset) if repair else 0,
        dtype=precision if precision != "no" else _dtype_name(work),
        label=label,
    )


def load_between(
    model: nn.Module,
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    x: float,
    *,
    keep_precision: bool = False,
) -> None:
    """Loads (1 − x) a + x b into the model, tensor by tensor, each at the model's device and dtype.

    Rounds to the wider of the two stored dtypes first, as a merged file would, unless `keep_precision`.
    """
    target = model.state_dict()
    with torch.no_grad():
        for name, a in state_a.items():
            target[name].copy_(between(a, state_b[name], x, target[name].device, keep_precision))
    forget_derived(model)


def between(a: Tensor, b: Tensor, x: float, device: torch.device, keep_precision: bool = False) -> Tensor:
    """(1 − x) a + x b for floating and complex tensors: exactly a at 0, b at 1 and a where a = b. Else a."""
    if not (a.is_floating_point() or a.is_complex()):
        return a
    device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
    wide = torch.complex128 if a.is_complex() else torch.float64
    mixed = torch.lerp(a.to(device, wide), b.to(device, wide), x)
    return mixed if keep_precision else mixed.to(torch.promote_types(a.dtype, b.dtype))


def _checked_grid(lambdas: Sequence[float]) -> tuple[float, ...]:
    grid = tuple(float(x) for x in lambdas)
    if len(grid) < 2 or grid[0] != 0 or grid[-1] != 1 or any(x >= y for x, y in zip(grid, grid[1:], strict=False)):
        raise MergeidError(f"the λ grid is {list(grid)}; expected increasing numbers from 0 to 1, both included")
    return grid


def _check_states(state_a: Mapping[str, Tensor], state_b: Mapping[str, Tensor], model: nn.Module) -> None:
    keys = model.state_dict()
    for label, state in (("first", state_a), ("second", state_b)):
        unknown = [name for name in state if name not in keys]
        if unknown:
            raise MergeidError(
                f"the {label} state has {unknown[0]!r}{_and_more(unknown)}, which the model has not; "
                f"expected only keys of {type(model).__name__}.state_dict()"
            )
        wrong = [name for name in state if state[name].shape != keys[name].shape]
        if wrong:
            name = wrong[0]
            raise MergeidError(
                f"{name!r}{_and_more(wrong)} has shape {list(state[name].shape)} in the {label} state; "
                f"the model expects {list(keys[name].shape)}"
            )
        given = {keys[name].data_ptr() for name in state}
        missing = [
            name
            for name, tensor in keys.items()
            if name not in state and isinstance(tensor, Tensor) and tensor.data_ptr() not in given
        ]
        if missing:
            raise MergeidError(f"the {label} state lacks {missing[0]!r}{_and_more(missing)}, which the model needs")
    if set(state_a) != set(state_b):
        name = sorted(set(state_a) ^ set(state_b))[0]
        raise MergeidError(f"{name!r} is in one of the two states only; expected the same keys in both")


def _in_precision(forward: Forward, mixed_precision: str | None, accelerator: Accelerator) -> Forward:
    """Accelerate fixes one mixed precision per process; an autocast of our own lets each call choose."""
    if mixed_precision is None:
        return forward
    dtype = MIXED_PRECISION[mixed_precision]

    def cast(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast(accelerator.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            return forward(model, batch)

    return cast


def _result(metrics: Sequence[Metrics], **facts: Any) -> BarrierResult:
    # A network that is never right has accuracy 0 if any other on the line is right once.
    has_accuracy = any(point.accuracy is not None for point in metrics)
    return BarrierResult(
        losses=tuple(point.loss for point in metrics),
        accuracies=tuple(point.accuracy or 0.0 for point in metrics) if has_accuracy else None,
        count=metrics[0].count,
        **facts,
    )


def _dtype_name(model: nn.Module) -> str:
    return str(input_dtype(model) or torch.float32).removeprefix("torch.")


def _and_more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
