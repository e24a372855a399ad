"""Layers that compute with the effective weight W_eff = F + D ⊙ W, whatever layer they were.

The layer's class is exchanged for a subclass in which ``weight`` reads as the effective weight, so that every forward
pass and every other reader (``F.linear(x, attn.qkv.weight)``) computes with it, and gradients flow to W through D.
The module's parameter is still W: ``named_parameters``, ``state_dict``, optimisers, ``.to`` and ``deepcopy`` see
``X.weight`` (W), and the buffers ``X.weight_fixed`` (F) and ``X.weight_mask`` (D) beside it.
``torch.nn.utils.parametrize`` would rename W to ``X.parametrizations.weight.original``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mergeid.errors import MergeidError
from mergeid.nn.names import FIXED, MASK


@dataclass(frozen=True)
class Parts:
    """The frozen parts of one parameter, of its shape: `fixed` is F, `mask` is D (None: all ones)."""

    fixed: Tensor
    mask: Tensor | None = None

    def scaled(self, factor: float) -> Parts:
        """Parts whose effective weight is `factor` times as large for every W."""
        mask = torch.ones_like(self.fixed) if self.mask is None else self.mask
        return Parts(factor * self.fixed, factor * mask)


def effective_weight(weight: Tensor, fixed: Tensor, mask: Tensor | None) -> Tensor:
    """F + D ⊙ W."""
    return fixed + (weight if mask is None else mask * weight)


class Asymmetric:
    """Mixin of all layers with fixed parts: ``isinstance(layer, Asymmetric)``."""

    ordinary: ClassVar[Any]
    fixed_names: ClassVar[tuple[str, ...]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time: a copy and a pickle name the class that it was made from.
        return _blank, (self.ordinary, self.fixed_names), self.__dict__.copy()


def _effective_property(name: str) -> property:
    def read(self: Any) -> Tensor:
        buffers = self._buffers
        return effective_weight(self._parameters[name], buffers[name + FIXED], buffers.get(name + MASK))

    return property(read, doc=f"Effective {name}: F + D ⊙ {name}; the trainable part is the parameter of that name.")


@cache
def _asymmetric_class(ordinary: Any, names: tuple[str, ...]) -> type[nn.Module]:
    body: dict[str, Any] = {name: _effective_property(name) for name in names}
    body |= {"ordinary": ordinary, "fixed_names": names}
    # a layer says what it is; a model that only holds a table of its own keeps the name that configs and loaders read
    named = any(n.endswith("weight") for n in names)
    body |= {"__module__": __name__ if named else ordinary.__module__}
    return type(f"Asymmetric{ordinary.__name__}" if named else ordinary.__name__, (Asymmetric, ordinary), body)


def _blank(ordinary: Any, names: tuple[str, ...]) -> nn.Module:
    made = _asymmetric_class(ordinary, names)
    return made.__new__(made)


def attach(module: nn.Module, parts: Mapping[str, Parts], where: str = "") -> nn.Module:
    """Make a layer asymmetric, in place.

    Args:
        module: any module that holds the parameters; it keeps them, and what they are.
        parts: parameter name -> F and D in that parameter's shape (cast to its dtype and device).
        where: what errors call the layer.

    Returns `module`. Raises `MergeidError` when it is asymmetric already, has no such parameter, or shapes differ.
    """
    name_of = where or type(module).__name__
    if isinstance(module, Asymmetric):
        raise MergeidError(f"layer {name_of!r} is asymmetric already; fold it first")
    for name, part in parts.items():
        parameter = module._parameters.get(name)
        if parameter is None:
            raise MergeidError(f"layer {name_of!r} has no parameter {name!r} of its own to put a fixed part beside")
        for tensor in (part.fixed, part.mask):
            if tensor is not None and tensor.shape != parameter.shape:
                raise MergeidError(
                    f"layer {name_of!r}: the fixed part of {name!r} has shape {list(tensor.shape)}, expected "
                    f"{list(parameter.shape)}"
                )
    for name, part in parts.items():
        parameter = module._parameters[name]
        assert parameter is not None
        module.register_buffer(name + FIXED, part.fixed.to(parameter))
        if part.mask is not None:
            module.register_buffer(name + MASK, part.mask.to(parameter))
    ordinary: Any = type(module)
    module.__class__ = _asymmetric_class(ordinary, tuple(parts))
    return module


def strip(module: nn.Module) -> None:
    """Make an asymmetric layer ordinary in place, its parameters as they are: fixed parts and masks are dropped."""
    if isinstance(module, Asymmetric):
        names = module.fixed_names
        module.__class__ = module.ordinary  # type: ignore[assignment]
        for name in names:
            for suffix in (FIXED, MASK):
                module._buffers.pop(name + suffix, None)
