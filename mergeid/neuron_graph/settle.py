"""Random weights on which a check says something.

Disturbed weights can make a deep network chaotic: where the statistics of its BatchNorm layers are far from those of
its activations, these grow or shrink from layer to layer, and a difference of one rounding error at the input is one of
20 % at the output (EfficientNetV2-M). A permutation changes the order of sums, so that such a network would refute
every graph, right or wrong. Then its statistics are made to suit its own activations, which keeps their size at every
depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mergeid.basics.hooks import heard
from mergeid.basics.on_demand import OnDemand

ROUNDINGS = 4
"""By how many rounding errors weights are shaken to see whether the outputs are reliable."""

SIZE = 0.1
"""Of settled activations: where activation functions are nearly straight, hundreds of layers magnify nothing."""


def shaken(generator: torch.Generator, dtype: torch.dtype) -> Callable[[str, Tensor], Tensor]:
    """A change of weights by a few rounding errors of `dtype`, which the result has."""

    def shake(value: Tensor) -> Tensor:
        noise = torch.rand(value.shape, generator=generator).to(value.device, dtype)
        return value.to(dtype) * (1 + ROUNDINGS * torch.finfo(dtype).eps * (2 * noise - 1))

    def change(_: str, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        return (
            OnDemand(value.rows, value.shape, dtype, value.device).then(shake)
            if isinstance(value, OnDemand)
            else shake(value)
        )

    return change


@contextmanager
def own_statistics(model: nn.Module) -> Iterator[None]:
    """While open, every layer with running statistics takes such that its output is small, around `SIZE`.

    Args:
        model: in eval mode. A layer that sees one value per channel keeps what it has.
    """

    @torch.no_grad()  # the model may have switched gradients on
    def take(layer: Any, args: tuple[Any, ...]) -> None:
        x = args[0].detach()
        over = [d for d in range(x.dim()) if d != 1]
        if x.numel() > x.shape[1]:
            # most of the mean stays: subtracting it, where all positions are nearly alike, would leave their rounding
            mean = x.double().mean(over) / 8
            layer.running_mean.copy_(mean)
            layer.running_var.copy_((x.double().square().mean(over) - mean.square()) / SIZE**2 + 1e-12)

    handles = [
        m.register_forward_pre_hook(take)
        for _, m in heard(model)
        if isinstance(getattr(m, "running_mean", None), Tensor) and isinstance(getattr(m, "running_var", None), Tensor)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
