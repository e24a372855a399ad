"""Operations that only move positions: the same movement is applied to the labels."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from mergeid.neuron_graph.layout import FREE, FROZEN, Fine, Layout, take, uniform, view
from mergeid.neuron_graph.rules import rule

if TYPE_CHECKING:
    from mergeid.neuron_graph.call import Call


@rule("view", "reshape", "_unsafe_view", "_reshape_alias", "flatten", "unflatten", "view_copy", "_reshape_copy")
def reshape(call: Call) -> Layout:
    layout = call.layout("self")
    if call.out.numel() == 0:
        return _empty(call, layout)
    shape = [max(n, 1) for n in call.out.shape]
    if prod(layout.shape) != prod(shape):
        # view(dtype) reinterprets values
        call.freeze_dims(layout, range(len(layout.dims)))
        return uniform(call.out.shape, FROZEN, layout.data)
    return view(call.facts, layout, shape, call.why)


def _empty(call: Call, layout: Layout) -> Layout:
    """A tensor without values: its last dimensions still tell what a layer's weights belong to."""
    old, new = layout.shape, tuple(call.out.shape)
    same = 0
    while same < min(len(old), len(new)) and old[-1 - same] == new[-1 - same] > 0:
        same += 1
    cut = len(old) - same
    layout = call.freeze_dims(layout, range(cut))
    lead = uniform(new[: len(new) - same], FROZEN).dims
    return layout.with_dims((*lead, *layout.dims[cut:]))


def permuted(layout: Layout, order: Sequence[int]) -> Layout:
    n = len(layout.dims)
    return layout.with_dims(layout.dims[d % n] for d in order)


@rule("permute", "permute_copy")
def permute(call: Call) -> Layout:
    return permuted(call.layout("self"), call["dims"])


@rule("transpose", "swapaxes", "transpose_copy")
def transpose(call: Call) -> Layout:
    layout = call.layout("self")
    n = len(layout.dims)
    order = list(range(n))
    if n:
        a, b = call["dim0"] % n, call["dim1"] % n
        order[a], order[b] = order[b], order[a]
    return permuted(layout, order)


@rule("t", "numpy_T", "mT", "t_copy")
def t(call: Call) -> Layout:
    layout = call.layout("self")
    return permuted(layout, range(len(layout.dims))[::-1])


@rule("unsqueeze", "unsqueeze_copy")
def unsqueeze(call: Call) -> Layout:
    layout = call.layout("self")
    d = call["dim"] % (len(layout.dims) + 1)
    return layout.with_dims((*layout.dims[:d], (), *layout.dims[d:]))


@rule("squeeze", "squeeze_copy")
def squeeze(call: Call) -> Layout:
    layout = call.layout("self")
    n = len(layout.dims)
    dims = call.get("dim")
    chosen = range(n) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % n for d in chosen if n and layout.shape[d % n] == 1}
    if n - len(gone) != call.out.dim():
        # an empty dimension stays
        call.freeze_dims(layout, range(n))
        return uniform(call.out.shape, FROZEN, layout.data)
    return layout.with_dims(x for d, x in enumerate(layout.dims) if d not in gone)


@rule("expand", "broadcast_to", "expand_copy")
def expand(call: Call) -> Layout:
    layout = call.layout("self")
    shape = call.out.shape
    lead = len(shape) - len(layout.dims)
    dims = [()] * lead + list(layout.dims)
    return layout.with_dims((Fine(n, FREE),) if not d and n > 1 else d for n, d in zip(shape, dims, strict=True))


@rule("repeat")
def repeat(call: Call) -> Layout:
    layout = call.layout("self")
    repeats = call["repeats"]
    dims = [()] * (len(repeats) - len(layout.dims)) + list(layout.dims)
    return layout.with_dims(((Fine(r, FREE), *d) if r > 1 else d) for r, d in zip(repeats, dims, strict=True))


def _drop(layout: Layout, dim: int) -> Layout:
    return layout.with_dims(x for d, x in enumerate(layout.dims) if d != dim)


@rule("select", "select_copy")
def select(call: Call) -> Layout:
    layout = call.layout("self")
    dim = call["dim"] % len(layout.dims)
    index = call["index"] % layout.shape[dim]
    return _drop(take(call.facts, layout, dim, np.array([index]), call.why), dim)


@rule("unbind", "unbind_copy")
def unbind(call: Call) -> list[Layout]:
    layout = call.layout("self")
    dim = call["dim"] % len(layout.dims)
    return [_drop(take(call.facts, layout, dim, np.array([i]), call.why), dim) for i in range(layout.shape[dim])]


@rule("slice", "slice_copy")
def slice_(call: Call) -> Layout:
    layout = call.layout("self")
    dim = call["dim"] % len(layout.dims)
    n = layout.shape[dim]
    index = np.arange(n)[slice(call.get("start"), call.get("end"), call["step"])]
    if len(index) == n:
        return layout
    return take(call.facts, layout, dim, index, call.why)


@rule("narrow")
def narrow(call: Call) -> Layout:
    layout = call.layout("self")
    start = int(call["start"])
    return take(call.facts, layout, call["dim"], np.arange(start, start + call["length"]), call.why)


@rule("chunk", "unsafe_chunk", "tensor_split", "split_with_sizes_copy", "unsafe_split_with_sizes")
@rule("split", "unsafe_split", "split_copy", "split_with_sizes")
def split(call: Call) -> list[Layout]:
    layout = call.layout("self")
    dim = call["dim"] % len(layout.dims)
    parts, start = [], 0
    for out in call.outputs():
        n = out.shape[dim]
        index = np.arange(start, start + n)
        whole = n == layout.shape[dim]
        parts.append(layout if whole else take(call.facts, layout, dim, index, call.why))
        start += n
    return parts


@rule("flip")
def flip(call: Call) -> Layout:
    layout = call.layout("self")
    for dim in call["dims"]:
        layout = _moved(call, layout, dim, np.arange(layout.shape[dim])[::-1])
    return layout


@rule("rot90")
def rot90(call: Call) -> Layout:
    """Quarter turns: positions in reverse, and two dimensions that change places."""
    layout = call.layout("self")
    n = len(layout.dims)
    a, b = (d % n for d in call["dims"])
    turns = call["k"] % 4
    for dim in ((), (b,), (a, b), (a,))[turns]:
        layout = _moved(call, layout, dim, np.arange(layout.shape[dim])[::-1])
    order = list(range(n))
    if turns % 2:
        order[a], order[b] = b, a
    return permuted(layout, order)


@rule("roll")
def roll(call: Call) -> Layout:
    layout = call.layout("self")
    dims = call["dims"]
    if not dims:
        return view(
            call.facts,
            _moved(
                call,
                view(call.facts, layout, [prod(layout.shape)], call.why),
                0,
                np.roll(np.arange(prod(layout.shape)), call["shifts"]),
            ),
            layout.shape,
            call.why,
        )
    for dim, shift in zip(dims, call["shifts"], strict=True):
        layout = _moved(call, layout, dim, np.roll(np.arange(layout.shape[dim]), shift))
    return layout


def _moved(call: Call, layout: Layout, dim: int, index: np.ndarray) -> Layout:
    return take(call.facts, layout, dim % len(layout.dims), index, call.why) if len(index) > 1 else layout


@rule("pixel_shuffle")
def pixel_shuffle(call: Call) -> Layout:
    layout = call.layout("self")
    r = call["upscale_factor"]
    *lead, c, h, w = layout.shape
    k = len(lead)
    layout = view(call.facts, layout, [*lead, c // r**2, r, r, h, w], call.why)
    layout = permuted(layout, [*range(k + 1), k + 3, k + 1, k + 4, k + 2])
    return view(call.facts, layout, call.out.shape, call.why)


@rule("pixel_unshuffle")
def pixel_unshuffle(call: Call) -> Layout:
    layout = call.layout("self")
    r = call["downscale_factor"]
    *lead, c, h, w = layout.shape
    k = len(lead)
    layout = view(call.facts, layout, [*lead, c, h // r, r, w // r, r], call.why)
    layout = permuted(layout, [*range(k + 1), k + 2, k + 4, k + 1, k + 3])
    return view(call.facts, layout, call.out.shape, call.why)


@rule("view_as_complex", "view_as_real")
def complex_parts(call: Call) -> Layout:
    """Real and imaginary part of one number keep their places."""
    layout = call.layout("self")
    n = len(layout.dims)
    if call.out.dim() < n:
        layout = call.freeze_dims(layout, [n - 1])
        return layout.with_dims(layout.dims[:-1])
    return layout.with_dims((*layout.dims, (Fine(2, FROZEN),)))


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(call: Call) -> Layout:
    layout = call.layout("self")
    n, c, *rest = layout.shape
    g = call["groups"]
    layout = view(call.facts, layout, [n, g, c // g, *rest], call.why)
    layout = permuted(layout, [0, 2, 1, *range(3, 3 + len(rest))])
    return view(call.facts, layout, call.out.shape, call.why)


@rule("diagonal", "diagonal_copy")
def diagonal(call: Call) -> Layout:
    """The pairs (i, i + offset) of two dimensions, in a new last one: the dimensions move together."""
    layout = call.layout("self")
    n = len(layout.dims)
    rows, columns = call["dim1"] % n, call["dim2"] % n
    rest = [d for d in range(n) if d not in (rows, columns)]
    height, width = layout.shape[rows], layout.shape[columns]
    i = np.arange(height)
    j = i + call["offset"]
    pairs = (i * width + j)[(j >= 0) & (j < width)]
    layout = permuted(layout, [*rest, rows, columns])
    layout = view(call.facts, layout, [*layout.shape[:-2], height * width], call.why)
    return take(call.facts, layout, n - 2, pairs, call.why)
