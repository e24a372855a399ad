"""Batch, layer, group and RMS norm, weight norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeid.neuron_graph.combine import combine, elementwise, reduce
from mergeid.neuron_graph.layout import Layout, view
from mergeid.neuron_graph.rules import rule
from mergeid.neuron_graph.rules.reduction import normalised

if TYPE_CHECKING:
    from mergeid.neuron_graph.call import Call


def _per_channel(call: Call, x: Layout, names: list[str]) -> Layout:
    """x [N, C, …] combined with vectors [C]."""
    letters = list(range(len(x.dims)))
    vectors = [(call.layout(n), [1]) for n in names if call.get(n) is not None]
    return combine(call.facts, [(x, letters), *vectors], letters, call.why)


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "batch_norm",
)
def batch_norm(call: Call) -> list[Layout | None]:
    x = call.layout("input")
    if call.get("training", False):
        x = normalised(call, x, [d for d in range(len(x.dims)) if d != 1])
    out = _per_channel(call, x, ["weight", "bias", "running_mean", "running_var"])
    return [out, *(None for _ in call.outputs()[1:])]


@rule("native_layer_norm", "layer_norm")
def layer_norm(call: Call) -> list[Layout | None]:
    x = call.layout("input")
    n = len(x.dims)
    k = len(call["normalized_shape"])
    out = normalised(call, x, range(n - k, n))
    scale = [call.layout(s) for s in ("weight", "bias") if call.get(s) is not None]
    out = elementwise(call.facts, [out, *scale], n, call.why)
    return [out, *(None for _ in call.outputs()[1:])]


@rule("rms_norm", "_fused_rms_norm")
def rms_norm(call: Call) -> list[Layout | None]:
    x = call.layout("input")
    n = len(x.dims)
    out = normalised(call, x, range(n - len(call["normalized_shape"]), n))
    if call.get("weight") is not None:
        out = elementwise(call.facts, [out, call.layout("weight")], n, call.why)
    return [out, *(None for _ in call.outputs()[1:])]


@rule("native_group_norm", "group_norm")
def group_norm(call: Call) -> list[Layout | None]:
    x = call.layout("input")
    shape = call.outputs()[0].shape
    groups = call.get("group") or call["num_groups"]
    n, c, *rest = shape
    grouped = view(call.facts, x, [n, groups, c // groups, *rest], call.why)
    grouped = normalised(call, grouped, range(2, len(grouped.dims)))
    out = _per_channel(call, view(call.facts, grouped, shape, call.why), ["weight", "bias"])
    return [out, *(None for _ in call.outputs()[1:])]


@rule("_weight_norm_interface")
def weight_norm(call: Call) -> list[Layout]:
    v, g = call.layout("v"), call.layout("g")
    n = len(v.dims)
    norm = reduce(call.facts, v, [d for d in range(n) if d != call["dim"] % n], True, call.why)
    out = elementwise(call.facts, [v, g, norm], n, call.why)
    return [out, norm]
