"""Elementwise operations with broadcasting."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from mergeid.neuron_graph.combine import combine, elementwise
from mergeid.neuron_graph.layout import FREE, FROZEN, Layout, of_axes, take, uniform
from mergeid.neuron_graph.rules import rule

if TYPE_CHECKING:
    from mergeid.neuron_graph.call import Call


@rule(
    "pointwise",
    "_to_copy",
    "clone",
    "contiguous",
    "lift_fresh",
    "lift_fresh_copy",
    "alias",
    "detach",
    "to",
    "copy_",
    "copy",
    "native_dropout",
    "dropout",
    "masked_fill",
    "where",
    "_conj",
    "_neg_view",
    *(f"{name}_copy" for name in ("alias", "detach", "_conj", "_neg_view")),
    "complex",
    "polar",
    "nan_to_num",
    "hardtanh",
    "hardswish",
    "log_sigmoid_forward",
    "floor_divide",
    "prelu",
    "_prelu_kernel",
    "rrelu_with_noise",
    "fake_quantize_per_tensor_affine_cachemask",
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    "_fake_quantize_learnable_per_tensor_affine",
    *(f"prims.{name}" for name in ("add", "sub", "mul", "div")),  # of tangents that are zero
)
def pointwise(call: Call) -> list[Layout]:
    out = call.outputs()
    n = max(t.dim() for t in out)
    layout = elementwise(call.facts, [call.layout_of(t) for t in call.tensors()], n, call.why)
    return [layout for _ in out]


@rule(
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "new_empty_strided",
    "empty",
    "empty_strided",
    "empty_permuted",
)
def constant_like(call: Call) -> Layout:
    """The same number everywhere, or none yet."""
    return uniform(call.out.shape, FREE)


@rule("fake_quantize_per_channel_affine_cachemask", "_fake_quantize_learnable_per_channel_affine")
def rounded_per_channel(call: Call) -> list[Layout]:
    """Every position of `axis` in steps of its own."""
    return _rounded(call, call["axis"], "scale", "zero_point")


@rule("_fused_moving_avg_obs_fq_helper", "_fused_moving_avg_obs_fq_helper_functional")
def rounded_and_observed(call: Call) -> list[Layout]:
    """The same, with the range seen so far, in steps that follow from it, of every position of `ch_axis` or of all."""
    kept = ("running_min", "running_max", "scale", "zero_point")
    call.aside = [call[n] for n in kept]
    rounded = _rounded(call, call["ch_axis"], *kept)
    statistics = call.outputs()[2:]
    return [*rounded[:2], *(call.layout(n) for n, _ in zip(kept, statistics, strict=False))]


def _rounded(call: Call, axis: int, *vectors: str) -> list[Layout]:
    x = call.layout("self")
    letters = list(range(len(x.dims)))
    one = [[axis % len(letters)] if call[n].numel() > 1 else [None] * call[n].dim() for n in vectors]
    out = combine(call.facts, [(x, letters), *zip(map(call.layout, vectors), one, strict=True)], letters, call.why)
    return [out for _ in call.outputs()]


@rule("is_same_size", "_has_same_storage_numel")
def shapes(call: Call) -> list[Layout]:
    """Asks for no values, and returns no tensor."""
    return []


@rule("bucketize")
def bucketize(call: Call) -> Layout:
    """Which interval a number lies in; the bounds are in order."""
    bounds = call.layout("boundaries")
    call.freeze_dims(bounds, range(len(bounds.dims)))
    return call.layout("self")


@rule("searchsorted")
def searchsorted(call: Call) -> Layout:
    """The same; with a row of bounds for every row of numbers, these are fixed too."""
    bounds = call.layout("sorted_sequence")
    call.freeze_dims(bounds, range(len(bounds.dims)))
    if call.get("sorter") is not None:
        call.freeze_dims(call.layout("sorter"), range(len(bounds.dims)))
    if not isinstance(call["self"], torch.Tensor):
        return uniform(call.out.shape, FROZEN)
    return call.freeze_dims(call.layout("self"), range(len(bounds.dims) - 1))


@rule("eye")
def eye(call: Call) -> Layout:
    """An identity matrix stays what it is where rows and columns move together."""
    n, m = call.out.shape
    if n != m or n < 2:
        return uniform(call.out.shape, FROZEN)
    labels = call.facts.fresh((n,))
    return of_axes((labels, labels), (n, n))


@rule("fill", "zero")
def fill(call: Call) -> Layout:
    layout = call.layout("self")
    value = call.get("value")
    if isinstance(value, torch.Tensor):
        return elementwise(call.facts, [layout, call.layout_of(value)], len(layout.dims), call.why)
    return layout


@rule("rand_like", "randn_like", "bernoulli", "uniform_", "normal_", "random_", "exponential_")
def noise(call: Call) -> Layout:
    return uniform(call.out.shape, FROZEN)


@rule("glu")
def glu(call: Call) -> Layout:
    layout = call.layout("self")
    dim = call["dim"] % len(layout.dims)
    half = call.out.shape[dim]
    parts = [take(call.facts, layout, dim, np.arange(k * half, (k + 1) * half), call.why) for k in range(2)]
    return elementwise(call.facts, parts, len(layout.dims), call.why)
