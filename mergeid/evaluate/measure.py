"""Loss and accuracy of one network on one data set, exact for every number of processes and every batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergeid.errors import MergeidError
from mergeid.evaluate.batches import (
    Collate,
    consecutive,
    dataset_length,
    describe,
    first_line,
    input_dtype,
    loaded,
    to_model,
)
from mergeid.plugins import Batch, LossParts

if TYPE_CHECKING:
    from accelerate import Accelerator

Forward = Callable[[nn.Module, Batch], Tensor]
Loss = Callable[[Tensor, Batch], "LossParts | None"]


@dataclass(frozen=True)
class Metrics:
    """What one network does on one data set.

    Attributes:
        loss: mean over all scored predictions, in nats.
        accuracy: share of right predictions, 0 to 1; None where the task has no accuracy.
        count: number of scored predictions (examples, or tokens).
    """

    loss: float
    accuracy: float | None
    count: int


def default_accelerator() -> Accelerator:
    """Accelerate as the launcher, the environment or an earlier call set it up."""
    from accelerate import Accelerator

    return Accelerator()


def make_accelerator(device: str | None = None) -> Accelerator:
    """An Accelerator on a chosen device (``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``); None lets Accelerate choose.

    Raises `MergeidError` when the device is not there, or when this Python process already works on another one
    (Accelerate keeps one device per process).
    """
    from accelerate import Accelerator

    if device is None:
        return Accelerator()
    try:
        wanted = torch.device(device)
        if wanted.type != "cpu":
            torch.zeros((), device=wanted)
        if wanted.type == "cuda" and wanted.index is not None:
            torch.cuda.set_device(wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise MergeidError(f"device {device!r} cannot be used here: {first_line(error)}") from error
    try:
        accelerator = Accelerator(cpu=wanted.type == "cpu")
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


def evaluate(
    model: nn.Module,
    dataset: Any,
    *,
    forward: Forward,
    loss: Loss,
    batch_size: int = 64,
    accelerator: Accelerator | None = None,
    collate: Collate | None = None,
    workers: int = 0,
) -> Metrics:
    """Loss and accuracy of `model` on every example of `dataset`, each counted once.

    loss = Σ loss / Σ count over all examples, summed in float64 without rounding from batch to batch. Processes
    share out whole batches (`mergeid.evaluate.batches`), so that the result is the same for any number of them,
    and the same for any batch size up to the rounding of the forward pass.

    Args:
        model: moved to the accelerator's device and run in eval mode; its training flags are restored.
        dataset: map-style; items are mappings from the model's keywords (and ``"labels"``) to tensors.
        forward: task output of a batch, ``adapter.forward``.
        loss: `LossParts` of an output, one entry per example.
        batch_size: examples per forward pass; for speed and memory only.
        accelerator: process group, device and mixed precision; by default `accelerate.Accelerator()`.
        collate: list of items to batch; torch's default for None.
        workers: processes that load the data.

    Raises:
        MergeidError: a data set without length or examples, data that does not fit the model, no task loss.
    """
    accelerator = accelerator or default_accelerator()
    slices = consecutive(dataset_length(dataset), batch_size)
    model.to(accelerator.device)
    dtype = input_dtype(model)
    sums = torch.zeros(len(slices), 3, dtype=torch.float64)
    rank, world = accelerator.process_index, accelerator.num_processes
    with eval_mode(model), torch.no_grad():
        for index, raw in loaded(dataset, slices, rank=rank, world=world, collate=collate, workers=workers):
            batch = to_model(raw, accelerator.device, dtype)
            with fits_the_model(batch):
                parts = loss(run_forward(model, batch, forward, accelerator), batch)
            sums[index] = _sums(parts, len(slices[index]))
    total_loss, correct, count = (_exact_sum(column) for column in reduce_sum(sums, accelerator).T.tolist())
    if count == 0:
        raise MergeidError("no prediction is scored: every label of the data is ignored; expected some to count")
    # `correct` is all zero where a task has no accuracy; one right prediction shows that it has one.
    return Metrics(total_loss / count, correct / count if correct else None, int(count))


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
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def reduce_sum(values: Tensor, accelerator: Accelerator) -> Tensor:
    """Σ over processes of a float64 CPU tensor in which every entry is nonzero on one process at most: exact."""
    if accelerator.num_processes == 1:
        return values
    total: Any = accelerator.reduce(values.to(accelerator.device), reduction="sum")
    return total.cpu()


def _sums(parts: LossParts | None, examples: int) -> Tensor:
    if parts is None:
        raise MergeidError("the model has no task loss on this data; expected a task head and 'labels' in the data")
    if parts.loss.shape[:1] != (examples,) or parts.count.shape[:1] != (examples,):
        raise MergeidError(
            f"the loss function gave shapes {list(parts.loss.shape)} and {list(parts.count.shape)} for a batch of "
            f"{examples} examples; expected one loss and one count per example"
        )
    return torch.stack([part.detach().cpu().double().sum() for part in parts])


def _exact_sum(values: list[float]) -> float:
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
