"""Sums, means, extrema and what is built of them: softmax, sorting, scans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergeid.neuron_graph.combine import elementwise, reduce, relate
from mergeid.neuron_graph.layout import FROZEN, Fine, Layout
from mergeid.neuron_graph.rules import rule
from mergeid.neuron_graph.rules.places import places_of

if TYPE_CHECKING:
    from mergeid.neuron_graph.call import Call


def dims_of(value: Any, n: int) -> list[int]:
    """A ``dim`` argument as a list; None and () mean all."""
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return list(range(n))
    return [value] if isinstance(value, int) else list(value)


def normalised(call: Call, layout: Layout, dims: Sequence[int]) -> Layout:
    """x scaled by statistics of x over `dims`."""
    statistic = reduce(call.facts, layout, dims, True, call.why)
    return elementwise(call.facts, [layout, statistic], len(layout.dims), call.why)


@rule(
    "sum",
    "mean",
    "amax",
    "amin",
    "prod",
    "std",
    "var",
    "var_mean",
    "std_mean",
    "norm",
    "linalg_vector_norm",
    "logsumexp",
    "any",
    "all",
    "nansum",
    "nanmean",
    "count_nonzero",
    "_is_all_true",
    "_is_any_true",
)
def reduction(call: Call) -> list[Layout]:
    layout = call.layout("self")
    n = len(layout.dims)
    if not n:
        return [layout for _ in call.outputs()]
    out = reduce(call.facts, layout, dims_of(call.get("dim"), n), bool(call.get("keepdim", False)), call.why)
    return [out for _ in call.outputs()]


@rule(
    "mse_loss",
    "smooth_l1_loss",
    "huber_loss",
    "soft_margin_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
)
def loss(call: Call) -> Layout:
    """An elementwise comparison, left as it is (`reduction` 0) or summed over all positions."""
    n = len(call.layout("self").dims)
    layouts = [call.layout_of(t) for t in call.tensors()]
    each = elementwise(call.facts, layouts, max(len(x.dims) for x in layouts), call.why)
    return reduce(call.facts, each, range(n), False, call.why) if call["reduction"] else each


@rule("max", "min", "aminmax", "median", "nanmedian", "mode")
def extremum(call: Call) -> list[Layout | None]:
    """Extreme values; where they stand along the dimension, by number, fixes its positions once anybody asks."""
    layout = call.layout("self")
    if call.get("other") is not None:
        out = elementwise(call.facts, [layout, call.layout("other")], call.out.dim(), call.why)
        return [out]
    n = len(layout.dims)
    dims = dims_of(call.get("dim"), n)
    outputs = call.outputs()
    if n and len(outputs) > 1 and not call.name.startswith("aten.aminmax"):
        if call.func._schema.is_mutable:
            layout = call.freeze_dims(layout, dims)
        else:
            call.recorder.counts(outputs[1], places_of(call, layout, dims))
    out = reduce(call.facts, layout, dims, bool(call.get("keepdim", False)), call.why)
    return [out for _ in outputs]


@rule("_fft_c2c", "_fft_r2c", "_fft_c2r")
def fourier(call: Call) -> Layout:
    """Positions of the transformed dimensions are read in order; the other dimensions keep their neurons."""
    layout = call.layout("self")
    dims = [d % len(layout.dims) for d in dims_of(call.get("dim"), len(layout.dims))]
    layout = call.freeze_dims(layout, dims)
    rest = reduce(call.facts, layout, dims, True, call.why)
    sizes = call.out.shape
    return rest.with_dims(
        ((Fine(sizes[d], FROZEN),) if sizes[d] > 1 else ()) if d in dims else x for d, x in enumerate(rest.dims)
    )


@rule("argmax", "argmin")
def arg_extremum(call: Call) -> Layout:
    layout = call.layout("self")
    dims = dims_of(call.get("dim"), len(layout.dims))
    call.recorder.counts(call.out, places_of(call, layout, dims))
    return reduce(call.facts, layout, dims, bool(call.get("keepdim")), call.why)


@rule("equal", "allclose")
def equal(call: Call) -> list[Layout]:
    """One answer for the whole of two tensors, which is no tensor: the same where both move alike."""
    if call["self"].shape == call["other"].shape:
        relate(call.facts, call.layout("self"), call.layout("other"), call.why)
    return []


@rule("renorm")
def renorm(call: Call) -> Layout:
    """Slices along a dimension that are too long are made shorter."""
    layout = call.layout("self")
    n = len(layout.dims)
    return normalised(call, layout, [d for d in range(n) if d != call["dim"] % n])


@rule("embedding_renorm")
def embedding_renorm(call: Call) -> Layout:
    """The rows that are looked up are made shorter where they are too long."""
    index = call.layout("indices")
    call.freeze_dims(index, range(len(index.dims)))
    return normalised(call, call.freeze_dims(call.layout("self"), [0]), [1])


@rule("segment_reduce")
def segment_reduce(call: Call) -> Layout:
    """Runs of positions along a dimension become one each."""
    layout = call.layout("data")
    axis = call["axis"] % len(layout.dims)
    layout = call.freeze_dims(layout, [axis])
    rest = reduce(call.facts, layout, [axis], True, call.why)
    n = call.out.shape[axis]
    return rest.with_dims(((Fine(n, FROZEN),) if n > 1 else ()) if d == axis else x for d, x in enumerate(rest.dims))


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def softmax(call: Call) -> Layout:
    return normalised(call, call.layout("self"), [call["dim"]])


@rule("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp")
def scan(call: Call) -> list[Layout]:
    """The dimension is read in order, so its positions are fixed."""
    layout = call.layout("self")
    if not layout.dims:
        return [layout for _ in call.outputs()]
    dim = call["dim"] % len(layout.dims)
    return _ranked(call, call.freeze_dims(layout, [dim]), dim)


@rule("topk", "sort", "argsort", "kthvalue")
def ordered(call: Call) -> list[Layout]:
    """Values by rank, which are the same in whatever order the neurons come, and the places where they stand."""
    layout = call.layout("self")
    if not layout.dims:
        return [layout for _ in call.outputs()]
    dim = call.get("dim", -1) % len(layout.dims)
    *_, places = call.outputs()
    call.recorder.counts(places, places_of(call, layout, [dim]))
    return _ranked(call, layout, dim)


def _ranked(call: Call, layout: Layout, dim: int) -> list[Layout]:
    """The other dimensions, and positions along this one, which are fixed."""
    n, results = len(layout.dims), []
    for out in call.outputs():
        rest = reduce(call.facts, layout, [dim], out.dim() == n, call.why)
        if out.dim() != n:
            results.append(rest)
            continue
        size = out.shape[dim]
        new = ((Fine(size, FROZEN),) if size > 1 else (),)
        results.append(rest.with_dims((*rest.dims[:dim], *new, *rest.dims[dim + 1 :])))
    return results
