"""Pooling, resizing, padding and patches: positions in space are fixed, channels pass through."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from mergeid.neuron_graph.combine import combine
from mergeid.neuron_graph.layout import FREE, FROZEN, Fine, Layout, uniform, view
from mergeid.neuron_graph.rules import rule
from mergeid.neuron_graph.rules.joining import concatenate

if TYPE_CHECKING:
    from mergeid.neuron_graph.call import Call


def _only(layout: Layout, dims: int) -> Layout:
    """Its first dimensions, where the others are frozen."""
    return layout.with_dims(layout.dims[:dims])


def _frozen_dims(shape: tuple[int, ...]) -> tuple[tuple[Fine, ...], ...]:
    return tuple((Fine(n, FROZEN),) if n > 1 else () for n in shape)


_POOLS = [
    f"{prefix}{kind}{d}d{suffix}"
    for d in (1, 2, 3)
    for kind in ("avg_pool", "max_pool")
    for prefix in ("", "adaptive_", "_adaptive_")
    for suffix in ("", "_with_indices")
]
_RESIZES = [
    f"{prefix}upsample_{kind}"
    for prefix in ("", "_")
    for kind in (
        "nearest1d",
        "nearest2d",
        "nearest3d",
        "nearest_exact1d",
        "nearest_exact2d",
        "nearest_exact3d",
        "linear1d",
        "bilinear2d",
        "bilinear2d_aa",
        "bicubic2d",
        "bicubic2d_aa",
        "trilinear3d",
        "lanczos2d_aa",
    )
]
_POOLS += ["fractional_max_pool2d", "fractional_max_pool3d"]
_PADS = [f"{kind}_pad{d}d" for kind in ("reflection", "replication") for d in (1, 2, 3)]


@rule(
    *_POOLS, *_RESIZES, *_PADS, "mkldnn_max_pool2d", "mkldnn_adaptive_avg_pool2d", "grid_sampler_2d", "grid_sampler_3d"
)
def spatial(call: Call) -> list[Layout]:
    name = "self" if "self" in call.bound else "input"
    layout = call.layout(name)
    outs = call.outputs()
    keep = 2 if len(layout.dims) >= 3 and call.out is not None else 1
    digit = next((int(c) for c in call.name.split("aten.")[1] if c in "123"), 2)
    keep = len(layout.dims) - digit
    layout = call.freeze_dims(layout, range(keep, len(layout.dims)))
    if "grid" in call.bound:
        # places are fixed; examples (heads, where they are folded into the batch) belong to their own grid
        grid = call.freeze_dims(call.layout("grid"), range(1, len(layout.dims)))
        lead = combine(call.facts, [(_only(layout, 2), "nc"), (_only(grid, 1), "n")], "nc", call.why)
        return [lead.with_dims((*lead.dims, *_frozen_dims(call.out.shape[2:])))]
    return [layout.with_dims((*layout.dims[:keep], *_frozen_dims(t.shape[keep:]))) for t in outs]


@rule("constant_pad_nd", "pad")
def pad(call: Call) -> Layout:
    """Padded channels are constants: they may be anything, as they are all alike."""
    layout = call.layout("self")
    n = len(layout.dims)
    amounts = call["pad"]
    for i in range(len(amounts) // 2):
        dim = n - 1 - i
        before, after = amounts[2 * i], amounts[2 * i + 1]
        if before == after == 0:
            continue
        shape = list(layout.shape)
        if min(before, after) < 0 or not any(f.kind != FROZEN for f in layout.dims[dim]):
            layout = call.freeze_dims(layout, [dim])
            size = shape[dim] + before + after
            layout = layout.with_dims((*layout.dims[:dim], *_frozen_dims((size,)), *layout.dims[dim + 1 :]))
            continue
        parts = []
        for amount in (before, None, after):
            if amount is None:
                parts.append(layout)
            elif amount:
                parts.append(uniform([amount if d == dim else 1 for d in range(n)], FREE, layout.data))
        layout = concatenate(call, parts, dim)
    return layout


@rule("max_unpool2d", "max_unpool3d")
def unpool(call: Call) -> Layout:
    """Values go back to the places that they were taken from; channels agree with those of the places."""
    keep = call.out.dim() - (3 if call.name.endswith("3d") else 2)
    layouts = [call.freeze_dims(call.layout(n), range(keep, call.out.dim())) for n in ("self", "indices")]
    lead = combine(call.facts, [(_only(x, keep), range(keep)) for x in layouts], range(keep), call.why)
    return lead.with_dims((*lead.dims, *_frozen_dims(call.out.shape[keep:])))


@rule("col2im")
def col2im(call: Call) -> Layout:
    """[..., C·k, L] -> [..., C, H, W]: the places of the kernel are fixed."""
    layout = call.layout("self")
    n = len(layout.dims)
    k = prod(call["kernel_size"])
    layout = view(call.facts, layout, [*layout.shape[:-2], layout.shape[-2] // k, k, layout.shape[-1]], call.why)
    layout = call.freeze_dims(layout, [n - 1, n])
    return layout.with_dims((*layout.dims[: n - 1], *_frozen_dims(call.out.shape[-2:])))


@rule("unfold_backward")
def fold_windows(call: Call) -> Layout:
    """[..., windows, ..., size] -> [..., length, ...]."""
    dim = call["dim"] % call.out.dim()
    layout = call.freeze_dims(call.layout("grad_in"), [dim, call.out.dim()])
    length = _frozen_dims((call.out.shape[dim],))
    return layout.with_dims((*layout.dims[:dim], *length, *layout.dims[dim + 1 : -1]))


@rule("im2col")
def im2col(call: Call) -> Layout:
    """[N, C, H, W] -> [N, C·k, L]: every channel at every place of the kernel."""
    layout = call.freeze_dims(call.layout("self"), [2, 3])
    k = call.out.shape[1] // layout.shape[1]
    places = (Fine(k, FROZEN),) if k != 1 else ()
    return layout.with_dims((layout.dims[0], (*layout.dims[1], *places), *_frozen_dims(call.out.shape[2:])))


@rule("unfold")
def unfold(call: Call) -> Layout:
    layout = call.layout("self")
    dim = call["dimension"] % len(layout.dims)
    layout = call.freeze_dims(layout, [dim])
    shape = call.out.shape
    windows, size = _frozen_dims((shape[dim], shape[-1]))
    return layout.with_dims((*layout.dims[:dim], windows, *layout.dims[dim + 1 :], size))
