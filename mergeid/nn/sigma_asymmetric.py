"""σ-asymmetric activations (Lim et al. 2024): FiGLU, an activation whose gate mixes neurons by a fixed matrix.

y = 2·σ(F x) ⊙ η(x) with η the ordinary activation, σ the logistic function and F a fixed random matrix over the
neurons. A permutation of the neurons changes F x, so that it is no symmetry any more. The factor 2 keeps the scale of
η(x) at initialisation (Lim et al. leave it out). There is no ordinary activation of the same function.
"""

from __future__ import annotations

from functools import cache
from math import sqrt
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from mergeid.errors import MergeidError
from mergeid.nn.names import GATE


class SigmaAsymmetric:
    """Mixin of activations with a fixed gate: ``isinstance(activation, SigmaAsymmetric)``."""

    ordinary: ClassVar[Any]

    def forward(self, x: Tensor) -> Tensor:
        """2·σ(F x) ⊙ η(x), of the shape of x."""
        # the gate first: η may work in place
        gate = torch.sigmoid(_mixed(x, self._buffers[GATE]))  # type: ignore[attr-defined]
        answer: Tensor = 2 * gate * super().forward(x)  # type: ignore[misc]
        return answer

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (self.ordinary,), self.__dict__.copy()


def _mixed(x: Tensor, gate: Tensor) -> Tensor:
    """F x over the last axis for a matrix [n, n], over the one before the spatial axes for a kernel [n, n, 1, …]."""
    if gate.dim() == 2:
        return F.linear(x, gate)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[gate.dim() - 3]
    return convolve(x, gate)


@cache
def _sigma_class(ordinary: Any) -> type[nn.Module]:
    body = {"ordinary": ordinary, "__module__": __name__}
    return type(f"SigmaAsymmetric{ordinary.__name__}", (SigmaAsymmetric, ordinary), body)


def _blank(ordinary: Any) -> nn.Module:
    made = _sigma_class(ordinary)
    return made.__new__(made)


def fixed_gate(width: int, places: int, *, sigma: float, generator: Generator) -> Tensor:
    """F = σ·N / √width, as a matrix [width, width] (`places` = 0: the neurons lie on the last axis) or as the kernel
    of a convolution with that many spatial axes (they lie before these)."""
    drawn = sigma / sqrt(width) * torch.randn(width, width, generator=generator)
    return drawn.reshape(width, width, *[1] * places)


def give_gate(activation: nn.Module, gate: Tensor, where: str = "") -> nn.Module:
    """Give an activation module its fixed gate, in place.

    Args:
        activation: an elementwise activation without parameters.
        gate: see `fixed_gate`.

    Returns `activation`. Raises `MergeidError` when it has a gate already, or a matrix of another form."""
    name = where or type(activation).__name__
    if isinstance(activation, SigmaAsymmetric):
        raise MergeidError(f"activation {name!r} is σ-asymmetric already")
    if gate.dim() not in (2, 3, 4, 5) or gate.shape[0] != gate.shape[1] or any(n != 1 for n in gate.shape[2:]):
        raise MergeidError(
            f"activation {name!r}: expected a gate [n, n], or [n, n, 1, …] with up to three spatial axes, got "
            f"{list(gate.shape)}"
        )
    activation.register_buffer(GATE, gate.clone())
    ordinary: Any = type(activation)
    activation.__class__ = _sigma_class(ordinary)
    return activation
