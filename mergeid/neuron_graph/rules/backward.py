"""Derivatives that a forward pass takes itself: forces out of an energy, scores, gradient penalties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from mergeid.neuron_graph.combine import combine, elementwise, reduce
from mergeid.neuron_graph.layout import Layout, view
from mergeid.neuron_graph.rules import rule
from mergeid.neuron_graph.rules.reduction import normalised

if TYPE_CHECKING:
    from mergeid.neuron_graph.call import Call


@rule(
    "softplus_backward",
    "elu_backward",
    "leaky_relu_backward",
    "hardtanh_backward",
    "hardswish_backward",
    "hardsigmoid_backward",
    "softshrink_backward",
    "hardshrink_backward",
    "log_sigmoid_backward",
    "mish_backward",
    "_prelu_kernel_backward",
    "rrelu_with_noise_backward",
)
def slope(call: Call) -> list[Layout]:
    """Elementwise as the function is."""
    names = ("grad_output", "grad_out", "self", "self_or_result", "weight", "noise")
    given = [call.layout(n) for n in names if isinstance(call.get(n), Tensor)]
    out = call.outputs()
    layout = elementwise(call.facts, given, out[0].dim(), call.why)
    return [layout for _ in out]


@rule("_softmax_backward_data", "_log_softmax_backward_data")
def softmax_backward(call: Call) -> Layout:
    return normalised(call, _together(call, "grad_output", "output"), [call["dim"]])


@rule("native_layer_norm_backward", "_fused_rms_norm_backward")
def layer_norm_backward(call: Call) -> list[Layout]:
    x = _together(call, "grad_out", "input")
    n, k = len(x.dims), len(call["normalized_shape"])
    scaled = elementwise(call.facts, [x, *_given(call, "weight")], n, call.why)
    inner = normalised(call, scaled, range(n - k, n))
    return _asked(call, inner, reduce(call.facts, x, range(n - k), False, call.why))


@rule("native_group_norm_backward")
def group_norm_backward(call: Call) -> list[Layout]:
    x = _together(call, "grad_out", "input")
    shape, groups = call["input"].shape, call["group"]
    n, c, *rest = shape
    scaled = _per_channel(call, x, "weight")
    grouped = view(call.facts, scaled, [n, groups, c // groups, *rest], call.why)
    grouped = normalised(call, grouped, range(2, len(grouped.dims)))
    return _asked(call, view(call.facts, grouped, shape, call.why), _by_channel(call, x))


@rule("native_batch_norm_backward")
def batch_norm_backward(call: Call) -> list[Layout]:
    x = _together(call, "grad_out", "input")
    inner = _per_channel(call, x, "weight", "running_mean", "running_var")
    if call["train"]:
        inner = normalised(call, inner, [d for d in range(len(x.dims)) if d != 1])
    return _asked(call, inner, _by_channel(call, x))


def _together(call: Call, *names: str) -> Layout:
    layouts = [call.layout(n) for n in names]
    return elementwise(call.facts, layouts, len(layouts[0].dims), call.why)


def _given(call: Call, *names: str) -> list[Layout]:
    return [call.layout(n) for n in names if call.get(n) is not None]


def _per_channel(call: Call, x: Layout, *vectors: str) -> Layout:
    """x [N, C, …] combined with vectors [C]."""
    letters: Sequence[int] = range(len(x.dims))
    return combine(call.facts, [(x, letters), *((v, [1]) for v in _given(call, *vectors))], letters, call.why)


def _by_channel(call: Call, x: Layout) -> Layout:
    return reduce(call.facts, x, [d for d in range(len(x.dims)) if d != 1], False, call.why)


def _asked(call: Call, inner: Layout, of_weights: Layout) -> list[Layout]:
    """The derivatives that were asked for: by the input, then by weight and bias."""
    first, *others = call["output_mask"]
    return [*([inner] if first else []), *(of_weights for asked in others if asked)]
