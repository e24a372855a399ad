"""The barrier between two networks, measured: loss and accuracy on the straight line from one to the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mergeid.basics import processes
from mergeid.basics.casting import holds_numbers, in_precision
from mergeid.basics.on_demand import OnDemand, Rows, rows_of
from mergeid.basics.on_demand import held as in_memory
from mergeid.basics.state import evaluating, forget_derived, tensors_of
from mergeid.data.batches import input_dtype, to_model
from mergeid.errors import MergeidError
from mergeid.evaluate.measure import Loss, Metrics, evaluate
from mergeid.evaluate.resume import PointFile, digest_of
from mergeid.models.examples import Examples
from mergeid.models.running import Forward, default_accelerator
from mergeid.plugins import Batch
from mergeid.repair.batchnorm import batchnorm_layers, calibration_batches, reestimate_batchnorm
from mergeid.repair.kind_of_inputs import Moved, as_trained, moved
from mergeid.repair.solve import solve_network
from mergeid.results.barrier import BarrierResult

if TYPE_CHECKING:
    from accelerate import Accelerator

LAMBDAS = tuple(k / 10 for k in range(11))
MIXED_PRECISION = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Line:
    """The straight line between two networks, and how a network on it is run.

    Attributes:
        state_a: state dict with the model's keys. A key may be missing only where the model ties it to another one.
        state_b: likewise, already aligned to a.
        model: the network to load them into.
        forward: ``adapter.forward``.
        loss: `LossParts` of an output and a batch.
        lambdas: increasing, from 0 to 1.
        label: name of the curve in tables and plots.
    """

    state_a: Mapping[str, Tensor]
    state_b: Mapping[str, Tensor]
    model: nn.Module
    forward: Forward
    loss: Loss
    lambdas: Sequence[float] = LAMBDAS
    label: str = ""


@dataclass(frozen=True)
class Measuring:
    """How networks are evaluated.

    Attributes:
        batch_size: examples per forward pass; for speed and memory only.
        dtype: evaluates in this dtype, interpolating without rounding to the stored one (``torch.float64``).
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``; by default the accelerator's.
        accelerator: process group and device; by default `accelerate.Accelerator()`.
        workers: processes that load the data.
    """

    batch_size: int = 64
    dtype: torch.dtype | None = None
    mixed_precision: str | None = None
    accelerator: Accelerator | None = None
    workers: int = 0


@dataclass(frozen=True)
class Reestimate:
    """BatchNorm statistics are estimated again at every point, the ends included (so that a pair with itself keeps
    barrier 0); `mergeid.repair.batchnorm` says how.

    Attributes:
        examples: to estimate them on.
        batch: runs all of them in batches of that size, exactly but in many passes. None takes as many as one batch can
            hold, in one pass.
        as_merged: in the way of `merge`, so that every point is the network that `merge` writes: shrunk by their
            sampling error (`mergeid.repair.shrunken`), and as they would be on the training's kind of inputs
            (`mergeid.repair.kind_of_inputs`). The ends are the models as they are.
    """

    examples: Examples | None
    batch: int | None = None
    as_merged: bool = False


@dataclass(frozen=True)
class Solve:
    """Every network between the ends is solved anew (`mergeid.repair.solve`): the curve leaves the straight line.

    Attributes:
        examples: to solve on, labels unused.
        inputs_of: leaves the labels of a batch away.
        size: examples in a batch.
    """

    examples: Examples
    inputs_of: Callable[[Batch], Batch]
    size: int = 64


def barrier_curve(
    line: Line,
    examples: Examples,
    how: Measuring | None = None,
    *,
    repair: Reestimate | Solve | None = None,
    resume: Path | None = None,
    inplace: bool = False,
    progress: Callable[[float, Metrics], None] | None = None,
) -> BarrierResult:
    """Evaluates (1 − λ) a + λ b for every λ.

    The ends are exactly the two networks, and a pair with itself stays itself at every λ (`torch.lerp` in float64,
    rounded to the wider of the two stored dtypes, as a merge would write it). Integer and bool buffers come from a.

    Args:
        line: the two networks.
        examples: to measure on, with labels.
        how: for speed, memory and precision.
        repair: of the networks on the line; `Reestimate` where the model has BatchNorm.
        resume: JSON file to which each finished point is added, and in which points of the same inputs are looked up.
        inplace: use the line's model itself as the workspace (saves a copy of it).
        progress: called on every process after each point.

    Raises:
        MergeidError: λ without 0 and 1, states that do not fit the model, repair without calibration data, data that
            does not fit the model.
    """
    how = how or Measuring()
    grid = _checked_grid(line.lambdas)
    _check_states(line.state_a, line.state_b, line.model)
    if how.mixed_precision not in (None, *MIXED_PRECISION):
        raise MergeidError(
            f"mixed precision {how.mixed_precision!r} is unknown; expected one of {', '.join(MIXED_PRECISION)}"
        )
    held = None
    if isinstance(repair, Solve) or (repair is not None and batchnorm_layers(line.model)):
        held = repair.examples
    if isinstance(repair, Reestimate) and held is None and batchnorm_layers(line.model):
        raise MergeidError(
            "re-estimating BatchNorm statistics needs calibration data; give some or turn the repair off"
        )
    accelerator = how.accelerator or default_accelerator()
    precision = how.mixed_precision or accelerator.mixed_precision
    forward = _in_precision(line.forward, how.mixed_precision, accelerator)
    work = line.model if inplace else copy.deepcopy(line.model)
    if isinstance(repair, Solve):  # which writes into weights
        in_memory(work)
    in_precision(evaluating(work), how.dtype, accelerator.device)
    batches, solve = None, None
    as_merged = isinstance(repair, Reestimate) and repair.as_merged
    if isinstance(repair, Solve):
        solve = _solver(line, work, repair, forward, keep_precision=how.dtype is not None)
    elif held is not None and repair is not None:
        batches = calibration_batches(
            work, held.items, size=repair.batch, forward=forward, collate=held.collate, accelerator=accelerator
        )

    points: dict[float, Metrics] = {}
    file = None
    if resume is not None:
        settings = {
            "model": type(line.model).__qualname__,
            "dtype": str(how.dtype),
            "precision": precision,
            "repair": batches is not None and [len(batches.dataset), as_merged],
            "device": accelerator.device.type,
            "task": [getattr(part, "__qualname__", type(part).__qualname__) for part in (line.forward, line.loss)],
        }
        data = [examples.items, None if held is None else held.items]
        file = PointFile(resume, digest_of([line.state_a, line.state_b], data, settings), accelerator)
        points = file.load()

    def measured(x: float) -> Metrics:
        load_between(work, line.state_a, line.state_b, x, keep_precision=how.dtype is not None)
        if batches is not None:
            reestimate_batchnorm(work, batches, forward=forward, accelerator=accelerator, shrink=as_merged)
            as_trained(work, [replace(end, share=s) for end, s in zip(ends, (1 - x, x), strict=False) if s])
        if solve is not None and 0 < x < 1:
            solve(x)
        return evaluate(
            work,
            examples.items,
            loss=line.loss,
            batch_size=how.batch_size,
            workers=how.workers,
            forward=forward,
            collate=examples.collate,
            accelerator=accelerator,
        )

    left = [x for x in grid if x not in points]
    ends: list[Moved] = []
    if as_merged and batches is not None and left:
        for x in (0.0, 1.0):
            load_between(work, line.state_a, line.state_b, x, keep_precision=how.dtype is not None)
            ends.append(moved(work, batches, 1.0, forward=forward, accelerator=accelerator))
    apart = len(left) - len(left) % processes.place()[1]  # one for each process; of the rest they share the batches
    new = chain(processes.in_turn(left[:apart], measured), map(measured, left[apart:]))
    for x in sorted(grid, key=lambda x: x not in points):
        if x not in points:
            points[x] = next(new)
            if file:
                file.add(x, points[x])
        if progress:
            progress(x, points[x])
    metrics = [points[x] for x in grid]
    # A network that is never right has accuracy 0 if any other on the line is right once.
    has_accuracy = any(point.accuracy is not None for point in metrics)
    return BarrierResult(
        lambdas=grid,
        losses=tuple(point.loss for point in metrics),
        accuracies=tuple(point.accuracy or 0.0 for point in metrics) if has_accuracy else None,
        count=metrics[0].count,
        repair=batches is not None,
        solved=solve is not None,
        calibration=0 if held is None else len(held),
        dtype=precision if precision != "no" else _dtype_name(work),
        label=line.label,
    )


def _solver(
    line: Line, work: nn.Module, repair: Solve, forward: Forward, *, keep_precision: bool
) -> Callable[[float], None]:
    """Solves the network in the workspace, which lies at a point of the line, towards what both ends say there."""
    ends = [copy.deepcopy(work) for _ in range(2)]
    for x, end in enumerate(ends):
        load_between(end, line.state_a, line.state_b, x, keep_precision=keep_precision)
    place, kind = next(work.parameters()).device, input_dtype(work)
    batches = [repair.inputs_of(to_model(b, place, kind)) for b in repair.examples.batches(repair.size)]

    def solve(x: float) -> None:
        solve_network(work, ends, [1 - x, x], forward, batches)

    return solve


def load_between(
    model: nn.Module,
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    x: float,
    *,
    keep_precision: bool = False,
) -> None:
    """Loads (1 − x) a + x b into the model, tensor by tensor, each at the model's device and dtype; weights that the
    model forms on demand are formed of both when they are used.

    Rounds to the wider of the two stored dtypes first, as a merged file would, unless `keep_precision`.
    """
    target = tensors_of(model)
    with torch.no_grad():
        for name, a in state_a.items():
            place, b = target[name], state_b[name]
            if isinstance(place, OnDemand):
                place.copy_(_when_used(a, b, x, place, keep_precision))
            else:
                place.copy_(between(a, b, x, place.device, keep_precision))
    forget_derived(model)


def _when_used(a: Tensor, b: Tensor, x: float, place: OnDemand, keep_precision: bool) -> OnDemand:
    """Rows of (1 − x) a + x b, formed whenever they are used."""

    def rows(which: Rows) -> Tensor:
        return between(rows_of(a, which), rows_of(b, which), x, place.device, keep_precision)

    return OnDemand(rows, place.shape, place.dtype, place.device)


def between(a: Tensor, b: Tensor, x: float, device: torch.device, keep_precision: bool = False) -> Tensor:
    """(1 − x) a + x b for floating and complex tensors: exactly a at 0, b at 1 and a where a = b. Else a."""
    if not holds_numbers(a):
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
    keys = tensors_of(model)
    for label, state in (("first", state_a), ("second", state_b)):
        unknown = [name for name in state if name not in keys]
        if unknown:
            raise MergeidError(
                f"the {label} state has {unknown[0]!r}{_and_more(unknown)}, which the model does not have; expected "
                f"only keys of {type(model).__name__}.state_dict()"
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
        raise MergeidError(f"{name!r} is in only one of the two states; expected the same keys in both")


def _in_precision(forward: Forward, mixed_precision: str | None, accelerator: Accelerator) -> Forward:
    """Accelerate fixes one mixed precision per process; an autocast of our own lets each call choose."""
    if mixed_precision is None:
        return forward
    dtype = MIXED_PRECISION[mixed_precision]

    def cast(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast(accelerator.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            return forward(model, batch)

    return cast


def _dtype_name(model: nn.Module) -> str:
    return str(input_dtype(model) or torch.float32).removeprefix("torch.")


def _and_more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
