"""Loss and accuracy of one network on one data set, exact for every number of processes and every batch size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergeid.data.batches import (
    Collate,
    consecutive,
    dataset_length,
    input_dtype,
    is_whole,
    loaded,
    the_only,
    to_model,
)
from mergeid.errors import MergeidError
from mergeid.models.running import (
    Forward,
    default_accelerator,
    eval_mode,
    fits_the_model,
    make_accelerator,
    reduce_sum,
    run_forward,
    share_of,
)
from mergeid.plugins import Batch, LossParts

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mergeid.models.examples import Examples
    from mergeid.models.loaded import Loaded
    from mergeid.request.request import Run

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
    share out whole batches (`mergeid.data.batches`), so that the result is the same for any number of them,
    and the same for any batch size up to the rounding of the forward pass.

    Args:
        model: moved to the accelerator's device and run in eval mode; its training flags are restored.
        dataset: map-style; items are mappings from the model's keywords (and ``"labels"``) to tensors. Whole inputs
            (`mergeid.data.batches.is_whole`) are run one by one.
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
    whole = is_whole(dataset)
    slices = consecutive(dataset_length(dataset), 1 if whole else batch_size)
    collate = the_only if whole else collate
    model.to(accelerator.device)
    dtype = input_dtype(model)
    sums = torch.zeros(len(slices), 3, dtype=torch.float64)
    rank, world = share_of(accelerator)
    with eval_mode(model), torch.no_grad():
        for index, raw in loaded(dataset, slices, rank=rank, world=world, collate=collate, workers=workers):
            batch = to_model(raw, accelerator.device, dtype)
            with fits_the_model(batch):
                parts = loss(run_forward(model, batch, forward, accelerator), batch)
            sums[index] = _sums(parts, None if whole else len(slices[index]))
    total_loss, correct, count = (_exact_sum(column) for column in reduce_sum(sums, accelerator).T.tolist())
    if count == 0:
        raise MergeidError("every label of the data is ignored, so nothing can be scored; expected some that count")
    # `correct` is all zero where a task has no accuracy; one right prediction shows that it has one.
    return Metrics(total_loss / count, correct / count if correct else None, int(count))


def evaluate_loaded(model: Loaded, examples: Examples, run: Run) -> Metrics:
    """`evaluate` of a model by its own task's loss, on a device by name. Raises as that does."""
    return evaluate(
        model.model,
        examples.items,
        forward=model.forward,
        loss=model.loss,
        batch_size=run.batch_size,
        accelerator=make_accelerator(run.place),
        collate=examples.collate,
    )


def _sums(parts: LossParts | None, examples: int | None) -> Tensor:
    """Over the examples; None: as many as there are losses."""
    if parts is None:
        raise MergeidError(
            "the model has no task loss on this data; give data with labels, and a model with a task head"
        )
    if examples is None and parts.loss.dim():
        examples = len(parts.loss)
    if parts.loss.shape[:1] != (examples,) or parts.count.shape[:1] != (examples,):
        raise MergeidError(
            f"the loss function gave shapes {list(parts.loss.shape)} and {list(parts.count.shape)} for a batch of "
            f"{examples} examples; expected one loss and one count per example"
        )
    return torch.stack([part.detach().cpu().double().sum() for part in parts])


def _exact_sum(values: list[float]) -> float:
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
