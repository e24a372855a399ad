"""Running a network: on which device, in which precision and mode, and whose fault it is where it does not run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergeid.basics import processes
from mergeid.data.batches import describe, first_line
from mergeid.errors import MergeidError, reason
from mergeid.plugins import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator

Forward = Callable[[nn.Module, Batch], Tensor]
PATIENCE = timedelta(days=7)


def default_accelerator() -> Accelerator:
    """Accelerate as the launcher, the environment or an earlier call set it up."""
    return _accelerator()


def _accelerator(**asked: object) -> Accelerator:
    from accelerate import Accelerator, PartialState

    before = bool(PartialState._shared_state)
    try:
        return Accelerator(**asked)  # type: ignore[arg-type]
    except (ValueError, RuntimeError) as error:
        if before:  # only another device can be in its way
            raise
        raise MergeidError(
            f"Accelerate cannot be set up: {reason(error)}; check how the processes are launched, and the variables "
            "ACCELERATE_*, RANK, WORLD_SIZE and MASTER_ADDR of the environment"
        ) from error


def make_accelerator(device: str | None = None) -> Accelerator:
    """An Accelerator on a chosen device (``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``); None lets Accelerate choose.

    Raises `MergeidError` when the device is not there, or when this Python process already works on another one
    (Accelerate keeps one device per process).
    """
    from accelerate.utils import InitProcessGroupKwargs

    if device is None:
        return _accelerator()
    try:
        wanted = torch.device(device)
        if wanted.type != "cpu":
            torch.zeros((), device=wanted)
        if wanted.type == "cuda" and wanted.index is not None:
            torch.cuda.set_device(wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise MergeidError(f"device {device!r} cannot be used here: {first_line(error)}") from error
    try:
        # processes wait for the one whose part takes longest
        patient = [InitProcessGroupKwargs(timeout=PATIENCE)] if processes.launched() > 1 else []
        accelerator = _accelerator(cpu=wanted.type == "cpu", kwargs_handlers=patient)
    except ValueError as error:
        raise MergeidError(
            f"device {device!r} was asked for, but Accelerate is already set up on another device; "
            "start a new Python process or leave the device out"
        ) from error
    if accelerator.device.type != wanted.type:
        raise MergeidError(
            f"device {device!r} was asked for, but Accelerate works on {accelerator.device}; "
            "check the accelerate configuration (ACCELERATE_* variables)"
        )
    return accelerator


def run_forward(model: nn.Module, batch: Batch, forward: Forward, accelerator: Accelerator) -> Tensor:
    """One forward pass in the accelerator's precision; 16-bit outputs come back in float32 for the loss."""
    with accelerator.autocast():
        output = forward(model, batch)
    return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output


@contextmanager
def fits_the_model(batch: Batch) -> Iterator[None]:
    """Turns the errors of a forward pass or a loss on this batch into one sentence that names its tensors."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise MergeidError(f"out of memory on a batch of {describe(batch)}; choose a smaller batch size") from error
    except (RuntimeError, LookupError, TypeError, ValueError) as error:
        raise MergeidError(
            f"the data does not fit the model: with a batch of {describe(batch)} it stops at "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own training flag afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    trains = any(training for _, training in flags)  # setting what is set already takes longer than a small network
    if trains:
        model.eval()
    try:
        yield
    finally:
        for module, training in flags if trains else ():
            module.training = training


def share_of(accelerator: Accelerator) -> tuple[int, int]:
    """The number of this process, and how many share the work that is at hand."""
    return (0, 1) if processes.is_alone() else (accelerator.process_index, accelerator.num_processes)


def reduce_sum(values: Tensor, accelerator: Accelerator) -> Tensor:
    """Σ over processes of a float64 CPU tensor in which every entry is nonzero on one process at most: exact."""
    if share_of(accelerator)[1] == 1:
        return values
    total: Any = accelerator.reduce(values.to(accelerator.device), reduction="sum")
    answer: Tensor = total.cpu()
    return answer
