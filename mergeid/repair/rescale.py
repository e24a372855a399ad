"""REPAIR for networks without BatchNorm: give the merged network's pre-activations the spread that they should have.

Averaged weights give activations of smaller variance than either parent's. REPAIR (Jordan et al. 2023,
arXiv:2211.08403) rescales every pre-activation so that its mean and standard deviation over the calibration data are
the weighted averages of the models' own:

    y ← (y − μ_merged) σ* / σ_merged + μ*,   μ* = Σ_i w_i μ_i,   σ* = Σ_i w_i σ_i,

channel by channel, in forward order: a layer is measured when all layers before it are repaired. The affine map is
folded into the layer's weight and bias; a layer without a bias can only be scaled, and keeps whatever mean that gives.

All moments are float64, pooled over batches (Chan, Golub, LeVeque 1983). With all data in one batch one pass does it
all; with several batches it takes a pass per layer, to the same result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_leaves

from mergeid.basics.hooks import heard
from mergeid.errors import MergeidError
from mergeid.methods.statistics import affine_axis, real_rows
from mergeid.models.running import Forward, eval_mode, fits_the_model
from mergeid.plugins import Batch

CONSTANT = 1e-6
"""A channel whose spread is below this share of the wanted one is constant, and is not blown up."""
SLICE = 1 << 22
"""Values converted to float64 at a time."""


class Layer(NamedTuple):
    """A layer whose outputs can be rescaled.

    Attributes:
        name: of the module.
        rows: the axis of its weight along which the outputs lie.
        channel: the dimension of its output that holds them (−1 or 1).
    """

    name: str
    rows: int
    channel: int


@dataclass
class Moments:
    """Count, mean [C] and sum of squared deviations [C] of a layer's outputs, float64."""

    count: float = 0.0
    mean: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def add(self, values: Tensor) -> None:
        """Rows [n, C]."""
        if len(values) == 0:
            return
        parts = values.split(max(1, SLICE // len(values)), dim=1)
        moments = [torch.var_mean(part.double(), dim=0, correction=0) for part in parts]
        variance, mean = (torch.cat(list(m)).cpu() for m in zip(*moments, strict=True))
        n = float(len(values))
        if self.count == 0:
            self.count, self.mean, self.squares = n, mean, variance * n
            return
        total, shift = self.count + n, mean - self.mean
        self.squares = self.squares + variance * n + shift.square() * (self.count * n / total)
        self.mean = self.mean + shift * (n / total)
        self.count = total

    @property
    def std(self) -> Tensor:
        """Population standard deviation, float64 [C]."""
        return (self.squares / max(self.count, 1.0)).clamp(min=0).sqrt()


@dataclass(frozen=True)
class Rescaled:
    """What REPAIR did.

    Attributes:
        tensors: state-dict key -> the new tensor, of the model that was repaired (not copies).
        layers: names of the layers, in forward order.
        without_bias: those that could only be scaled.
        before, after: median over all channels of σ_merged / σ*, before and after (1: as it should be).
    """

    tensors: dict[str, Tensor]
    layers: tuple[str, ...]
    without_bias: tuple[str, ...]
    before: float
    after: float


def rescalable_layers(model: nn.Module, batch: Batch, *, forward: Forward) -> list[Layer]:
    """Linear and convolutional layers in forward order, found by running one batch.

    Left out: layers that are called several times or not at all, that share their weight with another module, whose
    weight is computed from other tensors (weight standardisation, parametrisations), and those whose output is the
    task output, which has no later layer to disturb.
    """
    found: list[tuple[Layer, Tensor]] = []
    calls: Counter[str] = Counter()
    modules = {n: m for n, m in heard(model) if isinstance(m._parameters.get("weight"), Tensor)}
    owners = Counter(id(m.weight) for m in modules.values())

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            calls[name] += 1
            if not isinstance(x, Tensor) or not isinstance(out, Tensor) or owners[id(module.weight)] > 1:
                return
            if isinstance(module, _ConvNd):
                if not isinstance(module, _ConvTransposeNd) and _plain_conv(module, x, out):
                    found.append((Layer(name, 0, 1), out))
            elif (axis := affine_axis(module, x, out)) is not None:
                found.append((Layer(name, 1 - axis, -1), out))

        return hook

    handles = [m.register_forward_hook(watch(n), with_kwargs=True) for n, m in modules.items()]
    try:
        with eval_mode(model), torch.no_grad(), fits_the_model(batch):
            output = forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    results = {t.data_ptr() for t in tree_leaves(output) if isinstance(t, Tensor)}
    return [layer for layer, out in found if calls[layer.name] == 1 and out.data_ptr() not in results]


def _plain_conv(module: _ConvNd, x: Tensor, out: Tensor) -> bool:
    """Whether the layer convolves with its weight as it is stored."""
    if x.dim() != module.weight.dim():
        return False
    expected = module._conv_forward(x[:1], module.weight, module.bias)  # type: ignore[operator]
    scale = out[:1].abs().max().clamp(min=1e-12)
    return expected.shape == out[:1].shape and bool((expected - out[:1]).abs().max() <= 1e-3 * scale)


def output_moments(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch], *, forward: Forward
) -> dict[str, Moments]:
    """Moments of the outputs of these layers over all positions of all examples (padding left out)."""
    found = {layer.name: Moments() for layer in layers}
    for batch in batches:
        hooks = {layer.name: _measuring(layer, found[layer.name], batch) for layer in layers}
        with _hooks(model, hooks), eval_mode(model), torch.no_grad(), fits_the_model(batch):
            forward(model, batch)
    return found


class _Reached(BaseException):
    """The forward pass has been as far as it is needed."""


def _moments_of(model: nn.Module, layer: Layer, batches: Sequence[Batch], forward: Forward) -> Moments:
    """As `output_moments` of one layer; what comes after it does not run."""
    moments = Moments()

    def stop(module: nn.Module, args: Any, out: Any) -> None:
        raise _Reached

    with eval_mode(model), torch.no_grad():
        for batch in batches:
            measured = _hooks(model, {layer.name: _measuring(layer, moments, batch)})
            with measured, _hooks(model, {layer.name: stop}), fits_the_model(batch), suppress(_Reached):
                forward(model, batch)
    return moments


def rescale(
    model: nn.Module,
    layers: Sequence[Layer],
    targets: Mapping[str, tuple[Tensor, Tensor]],
    batches: Sequence[Batch],
    *,
    forward: Forward,
) -> Rescaled:
    """Rescale the outputs of these layers to the target statistics, one after the other.

    Args:
        model: the merged network, changed in place.
        layers: in forward order (`rescalable_layers`).
        targets: layer -> (μ*, σ*), float64 [C] each.
        batches: calibration batches, the same that the targets were measured on.
        forward: runs the model on a batch, ``adapter.forward``.

    Raises:
        MergeidError: no calibration batch, or data that does not fit the model.
    """
    if not len(batches):
        raise MergeidError("REPAIR cannot measure anything without data; expected calibration batches")
    before = output_moments(model, layers, batches, forward=forward)
    if len(batches) == 1:
        hooks = {layer.name: _repairing(layer, targets[layer.name], batches[0]) for layer in layers}
        with _hooks(model, hooks), eval_mode(model), torch.no_grad(), fits_the_model(batches[0]):
            forward(model, batches[0])
    else:
        for layer in layers:
            moments = _moments_of(model, layer, batches, forward)
            _fold(model.get_submodule(layer.name), layer, *_map_to(moments, targets[layer.name]))
    after = output_moments(model, layers, batches, forward=forward)
    touched = {id(p) for x in layers for p in _parameters(model.get_submodule(x.name))}
    return Rescaled(
        tensors={n: p.detach() for n, p in model.named_parameters(remove_duplicate=False) if id(p) in touched},
        layers=tuple(layer.name for layer in layers),
        without_bias=tuple(x.name for x in layers if len(_parameters(model.get_submodule(x.name))) == 1),
        before=_median_ratio(before, targets),
        after=_median_ratio(after, targets),
    )


def _parameters(module: nn.Module) -> list[Tensor]:
    return [p for n in ("weight", "bias") if (p := module._parameters.get(n)) is not None]


def _median_ratio(found: Mapping[str, Moments], targets: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    ratios = [found[n].std[std > 0] / std[std > 0] for n, (_, std) in targets.items() if n in found]
    values = torch.cat(ratios) if ratios else torch.ones(1, dtype=torch.float64)
    return values.median().item() if len(values) else 1.0


def _map_to(moments: Moments, target: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(factor, mean as it is, mean as it should be), float64 [C] each."""
    mean, std = target
    enough = moments.std > CONSTANT * std
    factor = torch.where(enough, std / torch.where(enough, moments.std, torch.ones_like(std)), torch.ones_like(std))
    return factor, moments.mean, mean


def _fold(module: nn.Module, layer: Layer, factor: Tensor, mean: Tensor, wanted: Tensor) -> None:
    """Weight and bias such that y becomes factor · (y − mean) + wanted (without a bias: factor · y)."""
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    shape = [1] * weight.dim()
    shape[layer.rows] = -1
    with torch.no_grad():
        weight.copy_(weight.double() * factor.to(weight.device).view(shape))
        if bias is not None:
            f, m, w = (t.to(bias.device) for t in (factor, mean, wanted))
            bias.copy_((bias.double() - m) * f + w)


def _rows(out: Tensor, layer: Layer, batch: Batch) -> Tensor:
    """The layer's output as [positions, C], positions that are padding left out."""
    if layer.channel == -1:
        return real_rows(out, batch)
    return out.movedim(layer.channel, -1).reshape(-1, out.shape[layer.channel])


Hook = Callable[[nn.Module, Any, Any], Any]


def _measuring(layer: Layer, moments: Moments, batch: Batch) -> Hook:
    def hook(module: nn.Module, args: Any, out: Any) -> None:
        moments.add(_rows(out.detach(), layer, batch))

    return hook


def _repairing(layer: Layer, target: tuple[Tensor, Tensor], batch: Batch) -> Hook:
    def hook(module: nn.Module, args: Any, out: Any) -> Tensor:
        moments = Moments()
        moments.add(_rows(out.detach(), layer, batch))
        factor, mean, wanted = _map_to(moments, target)
        _fold(module, layer, factor, mean, wanted)
        if module._parameters.get("bias") is None:
            wanted = factor * mean
        shape = [1] * out.dim()
        shape[layer.channel] = -1
        f, m, w = (t.to(out.device).view(shape) for t in (factor, mean, wanted))
        answer: Tensor = ((out.double() - m) * f + w).to(out.dtype)
        return answer

    return hook


@contextmanager
def _hooks(model: nn.Module, hooks: Mapping[str, Hook]) -> Iterator[None]:
    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
