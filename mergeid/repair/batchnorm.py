"""BatchNorm re-estimation: a merged network needs the activation statistics of its own weights.

Averaged weights give activations of smaller variance than either parent's, and averaged running statistics do not
fit them (REPAIR, arXiv:2211.08403). So the statistics are measured anew on calibration data.

Which statistics? Letting a network in training mode collect them batch by batch is not well defined: every layer then
normalises by its own batch, and the result, and the loss, depend on the batch size (midpoint-like networks on 32-pixel
images, where the last layers see one pixel: loss 0.79 with batches of 64, 0.57 with 256, 0.50 with all images in one).
Here they are defined without a batch: *the running mean and variance of every BatchNorm are the mean and the variance
of its inputs over all calibration data when the network runs, in eval mode, with these very statistics.* There is
exactly one such set (the first layer's input does not depend on it, the second's only on the first's, …), it does not
know of batch size or device count, and it is the state in which the merged network will be used.

A channel that is constant on the calibration data (a pixel that is nearly always empty) has no variance that could be
measured there; divided by none, any other value would blow up. It keeps the variance that it had.

How it is computed: one pass with all data in one batch, each layer normalising by that batch, gives exactly these
statistics. So the automatic choice is as many examples as fit into one batch of `ACTIVATION_BUDGET` (6,500 images of 32
pixels in a ResNet-18, 130 of 224 pixels in a ResNet-50: few examples exactly are worth more than many in pieces; in the
case above 500 images at once gave 0.49, 2,000 in batches of 256 0.57). A batch size that is asked for is kept to, with
the same result at a higher price: after such a pass over the pieces, eval-mode passes follow, each measuring all layers
under the statistics of the pass before, until nothing moves. After k passes the first k layers are exact, so that it
ends after as many passes as there are layers; a ResNet-18 needs 9 to 11 in float32 and 15 in float64, but an
EfficientNet all of its 49, with wild statistics on the way, so that stopping earlier would not be safe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Subset

from mergeid.data.batches import (
    Collate,
    FixedBatches,
    dataset_length,
    input_dtype,
    shared_out,
    to_model,
)
from mergeid.errors import MergeidError
from mergeid.models.running import (
    Forward,
    default_accelerator,
    eval_mode,
    fits_the_model,
    reduce_sum,
    run_forward,
    share_of,
)
from mergeid.plugins import Batch
from mergeid.repair.shrunken import CONSTANT, example_sums, shrunken, width

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mergeid.models.examples import Examples

SHARED_LAYER_PASSES = 100
"""Most passes for a model that calls one BatchNorm twice: it depends on itself, so that no number of passes is enough
for certain. Otherwise as many passes as layers are."""
ACTIVATION_BUDGET = 2 * 2**30
"""Bytes that an automatically sized calibration batch may need at the network's widest BatchNorm. A constant, and not a
share of the free memory, so that the same inputs give the same statistics everywhere."""
LIVE_TENSORS = 5
"""Tensors of that width held at a time: input, output, shortcut, and what the calling frames still refer to."""
SLICE = 2**22
"""Values converted to float64 at a time."""


def batchnorm_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The layers that `reestimate_batchnorm` measures, by name: every subclass of torch's BatchNorm that keeps running
    statistics (timm's BatchNormAct2d, SyncBatchNorm, …). Others normalise by the batch and have nothing to repair."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def calibration_batches(
    model: nn.Module,
    dataset: Any,
    *,
    forward: Forward,
    size: int | None = None,
    collate: Collate | None = None,
    accelerator: Accelerator | None = None,
    layers: Iterable[nn.Module] | None = None,
) -> FixedBatches:
    """Examples for `reestimate_batchnorm`, or for the repair of other `layers`.

    With a `size`, the whole data set in batches of about that many. Without, one batch of as many examples as
    `ACTIVATION_BUDGET` allows, evenly spaced over the data set: fast, and `len(batches.dataset)` says how many.
    """
    if size is None:
        count = dataset_length(dataset)
        around = list(batchnorm_layers(model).values() if layers is None else layers)
        size = min(
            count, _affordable_size(model, dataset, forward, collate, accelerator or default_accelerator(), around)
        )
        if size < count:
            dataset = Subset(dataset, [k * count // size for k in range(size)])
    return FixedBatches(dataset, size, collate)


def reestimated(
    model: nn.Module, examples: Examples, forward: Forward, accelerator: Accelerator, *, shrink: bool = False
) -> dict[str, Tensor]:
    """`reestimate_batchnorm` on as many of the examples as one batch can hold; arguments as there."""
    batches = calibration_batches(
        model, examples.items, forward=forward, collate=examples.collate, accelerator=accelerator
    )
    return reestimate_batchnorm(model, batches, forward=forward, accelerator=accelerator, shrink=shrink)


def reestimate_batchnorm(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    forward: Forward,
    accelerator: Accelerator | None = None,
    shrink: bool = False,
) -> dict[str, Tensor]:
    """Replaces the running statistics of every BatchNorm by those of its inputs over the calibration data.

    Mean and (population) variance are exact over all values of all examples, not moving averages: per-batch moments are
    taken in float64 and pooled by the parallel-variance formula (Chan, Golub, LeVeque 1983), in the order of the
    batches whatever process computed them. The module's text says what they mean and how many passes they take.
    Dropout and everything else stays in eval mode; a BatchNorm that the forward pass never calls keeps its statistics,
    a constant channel its variance.

    Args:
        model: changed in place and moved to the accelerator's device.
        batches: `calibration_batches(...)`, or any sequence or iterable of batches, the same on all processes.
        forward: runs the model on a batch, ``adapter.forward``.
        accelerator: process group, device, mixed precision; by default `accelerate.Accelerator()`.
        shrink: towards the statistics that the layers have, by the sampling error (`mergeid.repair.shrunken`): what few
            inputs cannot tell stays. One example tells nothing.

    Returns:
        The changed tensors of the model's state dict by name (not copies); empty for a model without BatchNorm.

    Raises:
        MergeidError: no calibration batch, or data that does not fit the model.
    """
    layers = list(batchnorm_layers(model).values())
    if not layers:
        return {}
    run = _Run(model, layers, forward, accelerator or default_accelerator(), batches, shrink)
    first = run.measure(by_batch=True)
    if run.count > 1 or first.repeated:
        tolerance = first.epsilon**0.75  # float64 2e-12, float32 6e-6, bfloat16 3e-2
        for _ in range(SHARED_LAYER_PASSES if first.repeated else len(layers)):
            before = [_statistics(layer) for layer in layers]
            run.measure(by_batch=False)
            if _largest_change(before, layers) <= tolerance:  # goes on at nan, which later passes may cure
                break
    return _state_tensors(model, first.called)


class _Pass(NamedTuple):
    """What one pass saw: ids of the layers that were called, whether one was called twice on a batch, and the machine
    epsilon of the coarsest input dtype."""

    called: set[int]
    repeated: bool
    epsilon: float


@dataclass
class _Run:
    """Repeated passes over this process's share of the calibration batches. `own`: the layers' statistics before."""

    model: nn.Module
    layers: list[_BatchNorm]
    forward: Forward
    accelerator: Accelerator
    batches: Iterable[Batch]
    shrink: bool
    count: int = 0
    mine: list[tuple[int, Batch]] = field(default_factory=list)
    own: list[_Own] = field(default_factory=list)

    def __post_init__(self) -> None:
        rank, world = share_of(self.accelerator)
        self.mine = list(shared_out(self.batches, rank=rank, world=world))
        counts = torch.zeros(world, dtype=torch.float64)
        counts[rank] = len(self.mine)
        self.count = int(reduce_sum(counts, self.accelerator).sum())
        if self.count == 0:
            raise MergeidError("BatchNorm statistics cannot be measured without data; expected calibration batches")
        self.model.to(self.accelerator.device)
        self.dtype = input_dtype(self.model)
        self.own = [_Own(*_statistics(layer), self.shrink) for layer in self.layers]

    def measure(self, *, by_batch: bool) -> _Pass:
        """One pass over all data that ends with the pooled statistics in place.

        `by_batch` normalises each batch by its own statistics; otherwise those in place stay until the end.
        """
        widths = [own.width for own in self.own]
        table = torch.zeros(self.count, sum(widths) + 2, dtype=torch.float64)  # one row per batch
        with eval_mode(self.model), torch.no_grad(), _moments(self.layers, self.own, place=by_batch) as seen:
            for index, raw in self.mine:
                batch = to_model(raw, self.accelerator.device, self.dtype)
                with fits_the_model(batch):
                    run_forward(self.model, batch, self.forward, self.accelerator)
                rows = [
                    _pool(torch.stack(calls), layer.num_features) if calls else torch.zeros(size, dtype=torch.float64)
                    for layer, calls, size in zip(self.layers, seen.moments, widths, strict=True)
                ]
                repeated = any(len(calls) > 1 for calls in seen.moments)
                table[index] = torch.cat([*rows, torch.tensor([repeated, seen.epsilon], dtype=torch.float64)])
                for calls in seen.moments:
                    calls.clear()
        table = reduce_sum(table, self.accelerator)
        called = set()
        for layer, own, rows in zip(self.layers, self.own, table[:, :-2].split(widths, dim=1), strict=True):
            pooled = _pool(rows, layer.num_features)
            if pooled[0] > 0:
                own.put(layer, pooled)
                called.add(id(layer))
        return _Pass(called, bool(table[:, -2].any()), table[:, -1].max().item())


@dataclass(frozen=True)
class _Own:
    """The statistics that a layer had, and what becomes of measured ones."""

    mean: Tensor
    variance: Tensor
    shrink: bool

    @property
    def width(self) -> int:
        """Numbers that a call leaves: count, mean [C], sum of squared deviations [C], and `example_sums`."""
        return 1 + 2 * len(self.mean) + (width(len(self.mean)) if self.shrink else 0)

    def put(self, layer: Any, moments: Tensor) -> None:
        """Mean and variance of a layer's inputs, put in place; of a constant channel the variance stays."""
        channels = len(self.mean)
        count, mean, squares, sums = moments.split([1, channels, channels, len(moments) - 1 - 2 * channels])
        own, variance = self.variance.to(moments), squares / count
        constant = ~(variance > CONSTANT * own)
        if self.shrink:
            mean, variance = shrunken(count, mean, variance, sums, (self.mean.to(moments), own))
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(torch.where(constant, own, variance))


@dataclass
class _Seen:
    """Per layer, one entry (`_Own.width`) for each call, in float64; and the machine epsilon of the coarsest input
    dtype."""

    moments: list[list[Tensor]]
    epsilon: float = 0.0


@contextmanager
def _moments(layers: Sequence[_BatchNorm], own: Sequence[_Own], *, place: bool) -> Iterator[_Seen]:
    """While open, every call of a layer leaves the moments of its input. The layers stay in eval mode; with `place` the
    call's statistics are put in place before it, which is training-mode normalisation for every subclass, without its
    moving average and without its process group."""
    seen = _Seen([[] for _ in layers])

    def watch(calls: list[Tensor], had: _Own) -> Callable[..., None]:
        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            if x.numel() == 0:
                return
            seen.epsilon = max(seen.epsilon, torch.finfo(x.dtype).eps)
            x = x.cpu() if x.device.type == "mps" else x  # MPS has no float64
            count = x.numel() // x.shape[1]
            over = [0, *range(2, x.dim())]
            parts = x.split(max(1, SLICE // count), dim=1)
            moments = [torch.var_mean(part.double(), dim=over, correction=0) for part in parts]
            variance, mean = (torch.cat(values) for values in zip(*moments, strict=True))
            found = torch.cat([mean.new_tensor([count]), mean, variance * count]).cpu()
            if had.shrink:
                found = torch.cat([found, _example_sums(parts, had.mean)])
            calls.append(found)
            if place:
                had.put(layer, found)

        return hook

    handles = [
        layer.register_forward_pre_hook(watch(calls, had), with_kwargs=True)
        for layer, calls, had in zip(layers, seen.moments, own, strict=True)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _example_sums(parts: Sequence[Tensor], about: Tensor) -> Tensor:
    """`example_sums` of an input in slices of its channels, on the CPU."""
    found, start = [], 0
    for part in parts:
        found.append(example_sums(part, about[start : start + part.shape[1]]).cpu())
        start += part.shape[1]
    return torch.cat([found[0][:2], *torch.cat([f[2:].reshape(5, -1) for f in found], 1)])


def _pool(rows: Tensor, channels: int) -> Tensor:
    """(count, mean, sum of squared deviations, sums that add up) of the union of parts, from those of each part."""
    count, mean, squares = rows[:, :1], rows[:, 1 : 1 + channels], rows[:, 1 + channels : 1 + 2 * channels]
    total = count.sum()
    pooled_mean = (count * mean).sum(0) / total.clamp(min=1)
    pooled_squares = (squares + count * (mean - pooled_mean) ** 2).sum(0)
    return torch.cat([total[None], pooled_mean, pooled_squares, rows[:, 1 + 2 * channels :].sum(0)])


def _statistics(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.running_mean.cpu().double().clone(), layer.running_var.cpu().double().clone()


def _largest_change(before: list[tuple[Tensor, Tensor]], layers: Sequence[_BatchNorm]) -> float:
    """Largest move of a mean in standard deviations, or of a variance in variances, ε of the layer included."""
    largest = 0.0
    for (old_mean, old_variance), layer in zip(before, layers, strict=True):
        mean, variance = _statistics(layer)
        scale = variance + layer.eps
        moved = torch.maximum((mean - old_mean).abs() / scale.sqrt(), (variance - old_variance).abs() / scale)
        largest = max(largest, moved.max().item())
    return largest


def _state_tensors(model: nn.Module, layers: set[int]) -> dict[str, Tensor]:
    """Running statistics of these layers under every name that they have in the model's state dict."""
    return {
        f"{name}.{kind}" if name else kind: getattr(module, kind)
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in layers
        for kind in ("running_mean", "running_var")
    }


def _affordable_size(
    model: nn.Module,
    dataset: Any,
    forward: Forward,
    collate: Collate | None,
    accelerator: Accelerator,
    layers: Sequence[nn.Module],
) -> int:
    """Examples whose activations around the widest of the layers fit the budget."""
    widest = 0

    def note(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal widest
        x = args[0] if args else kwargs["input"]
        widest = max(widest, LIVE_TENSORS * x.numel() * x.element_size())

    model.to(accelerator.device)
    probe = to_model(FixedBatches(dataset, 1, collate)[0], accelerator.device, input_dtype(model))
    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        with eval_mode(model), torch.no_grad(), fits_the_model(probe):
            run_forward(model, probe, forward, accelerator)
    finally:
        for hook in hooks:
            hook.remove()
    return max(1, ACTIVATION_BUDGET // max(widest, 1))
