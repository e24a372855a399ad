"""(IA)³: weights times vectors of their outputs or inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid.errors import MergeidError, shown
from mergeid.io.derived import Formed
from mergeid.io.lora_checks import finite, misfit
from mergeid.io.tensors import TensorSource

if TYPE_CHECKING:
    from torch import Tensor


def feedforward_of(path: Path, told: Any) -> str | tuple[str, ...]:
    """``feedforward_modules`` of a config: a pattern of names, or ends of names. Raises `MergeidError` for others."""
    names = () if told is None else told if isinstance(told, str) else tuple(told) if isinstance(told, list) else None
    try:
        if isinstance(names, str):
            re.compile(names)
        elif names is None or not all(isinstance(n, str) for n in names):
            raise MergeidError(f"{path}: feedforward_modules is {shown(told)}; expected names of modules, or a pattern")
    except re.error as error:
        raise MergeidError(
            f"{path}: feedforward_modules {shown(told)} is no pattern ({error}); expected names of modules"
        ) from None
    return names


def scales_inputs(feedforward: str | tuple[str, ...], module: str) -> bool:
    """Whether the vector of a module is of its inputs, as PEFT decides it."""
    return bool(re.fullmatch(feedforward, module)) if isinstance(feedforward, str) else module.endswith(feedforward)


def scaled(
    formed: Mapping[str, Formed],
    base: TensorSource,
    target: str,
    adapter: TensorSource,
    vector: str,
    *,
    inputs: bool,
    transposed: bool,
) -> dict[str, Formed]:
    """A weight times a vector of outputs, and the layer's bias with it, or of inputs.

    Args:
        vector: of linear layers [out, 1] or [1, in]; of convolutions [1, out, 1, …] or [1, in, 1, …].
        inputs: which of the two it is where its shape does not say that.
        transposed: whether linear weights are stored [in, out].

    Raises:
        MergeidError: it is neither.
    """
    shape, own = tuple(base.table[target].shape), tuple(adapter.table[vector].shape)
    fits = _fits(shape, own, transposed)
    inputs = inputs if fits[inputs] else not inputs
    if not fits[inputs]:
        raise misfit(adapter.file_of[vector], vector, own, base, target)

    def times(under: Formed, *, bias: bool) -> Formed:
        def form() -> Tensor:
            import torch

            value, by = under.form(), finite(adapter, vector)
            wide = torch.float64 if value.dtype.itemsize >= 4 else torch.float32
            by = by.flatten() if bias else _spread(by, shape, inputs, transposed)
            return (value.to(wide) * by.to(wide)).to(value.dtype)

        how = f"{under.how}, times a vector of {'inputs' if inputs else 'outputs'}, transposed {transposed}"
        return Formed(under.info, form, (*under.reads, (adapter, vector)), how)

    bias = f"{target.removesuffix('.weight')}.bias"
    found = {target: times(formed[target], bias=False)}
    return found | ({bias: times(formed[bias], bias=True)} if not inputs and bias in formed else {})


def _fits(weight: tuple[int, ...], own: tuple[int, ...], transposed: bool) -> tuple[bool, bool]:
    """Whether a vector can be of the outputs, and of the inputs."""
    if len(weight) == 2:
        out, into = weight[::-1] if transposed else weight
        return own == (out, 1), own == (1, into)
    if len(weight) < 3 or len(own) != len(weight) or prod(own) != own[1] or not prod(weight):
        return False, False
    groups, rest = divmod(own[1], weight[1])
    return own[1] == weight[0], not rest and groups > 0 and weight[0] % groups == 0


def _spread(by: Tensor, weight: tuple[int, ...], inputs: bool, transposed: bool) -> Tensor:
    """A vector in a shape that broadcasts over the weight; groups of a convolution have inputs of their own."""
    if len(weight) == 2:
        return by.T if transposed else by
    if not inputs:
        return by.transpose(0, 1)
    groups = by.numel() // weight[1]
    return by.reshape(groups, weight[1], *by.shape[2:]).repeat_interleave(weight[0] // groups, 0)
