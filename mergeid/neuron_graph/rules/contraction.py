"""Matrix products, convolutions and attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergeid.neuron_graph.combine import combine, elementwise
from mergeid.neuron_graph.layout import FROZEN, Fine, Layout, view
from mergeid.neuron_graph.rules import rule

if TYPE_CHECKING:
    from mergeid.neuron_graph.call import Call


_PRODUCTS = {
    "mm": ("self", "nk", "mat2", "km", "nm"),
    "bmm": ("self", "bnk", "mat2", "bkm", "bnm"),
    "mv": ("self", "nk", "vec", "k", "n"),
    "addmm": ("mat1", "nk", "mat2", "km", "nm"),
    "_sparse_addmm": ("mat1", "nk", "mat2", "km", "nm"),
    "baddbmm": ("batch1", "bnk", "batch2", "bkm", "bnm"),
    "addbmm": ("batch1", "bnk", "batch2", "bkm", "nm"),
    "addr": ("vec1", "n", "vec2", "m", "nm"),
    "addmv": ("mat", "nk", "vec", "k", "n"),
}
"""Op -> its two factors with their indices, and those of the product, to which ops that add add `self`."""


@rule(*_PRODUCTS)
def product(call: Call) -> Layout:
    first, of_first, second, of_second, out = _PRODUCTS[call.name.removeprefix("aten.").rstrip("_")]
    factors = [(call.layout(first), of_first), (call.layout(second), of_second)]
    found = combine(call.facts, factors, out, call.why)
    if first == "self":
        return found
    return elementwise(call.facts, [found, call.layout("self")], len(out), call.why)


@rule("_grouped_mm")
def grouped_mm(call: Call) -> Layout | None:
    """Rows [N, K] by the matrix [E, K, M] of the expert that data chose for them: experts stay, widths are shared."""
    x, w = call.layout("self"), call.layout("mat2")
    if len(x.dims) != 2 or len(w.dims) != 3:
        for layout in (x, w):
            call.facts.freeze(layout.all_labels, call.why)
        return None
    w = call.freeze_dims(w, [0])
    w = w.with_dims(w.dims[1:])
    return combine(call.facts, [(x, "nk"), (w, "km")], "nm", call.why)


@rule("linalg_solve_triangular")
def solve_triangular(call: Call) -> Layout:
    """A x = b for every column of b (or x A = b for every row): a system's own unknowns are fixed."""
    a, b = call.layout("self"), call.layout("B")
    n = len(a.dims)
    left = call.get("left", True)
    a, b = call.freeze_dims(a, [n - 2, n - 1]), call.freeze_dims(b, [n - 2 if left else n - 1])
    lead = list(range(n - 2))
    system, right = ([*lead, "i", "j"], [*lead, "j", "k"]) if left else ([*lead, "j", "i"], [*lead, "k", "j"])
    return combine(call.facts, [(a, system), (b, right)], [*lead, "i", "k"] if left else [*lead, "k", "i"], call.why)


@rule("dot", "vdot")
def dot(call: Call) -> Layout:
    names = [s.name for s in call.func._schema.arguments[:2]]
    return combine(call.facts, [(call.layout(n), "k") for n in names], "", call.why)


@rule("linear")
def linear(call: Call) -> Layout:
    x = call.layout("input")
    lead = list(range(len(x.dims) - 1))
    out = combine(call.facts, [(x, [*lead, "k"]), (call.layout("weight"), ["o", "k"])], [*lead, "o"], call.why)
    if call.get("bias") is not None:
        out = elementwise(call.facts, [out, call.layout("bias")], len(out.dims), call.why)
    return out


@rule("convolution", "_convolution", "convolution_overrideable")
def convolution(call: Call) -> Layout:
    """Contracts the channels inside each group; kernel and spatial positions are fixed, but along a dimension where the
    kernel is one place wide every position goes its own way."""
    x, w = call.layout("input"), call.layout("weight")
    spatial = range(2, len(x.dims))
    alone = [d for d in spatial if w.shape[d] == 1 and _each(call["stride"], d) == 1 and _each(call["padding"], d) == 0]
    x, w = call.freeze_dims(x, [d for d in spatial if d not in alone]), call.freeze_dims(w, range(2, len(w.dims)))
    groups = call["groups"]
    n, c = x.shape[:2]
    a, b, *kernel = w.shape
    x = view(call.facts, x, [n, groups, c // groups, *x.shape[2:]], call.why)
    w = view(call.facts, w, [groups, a // groups, b, *kernel], call.why)
    places = [f"s{d}" for d in spatial]
    taps = [f"k{d}" for d in range(len(kernel))]
    inner = "io" if call["transposed"] else "oi"
    kept = [f"s{d}" for d in alone]
    operands = [(x, ["n", "g", "i", *places]), (w, ["g", *inner, *taps])]
    out = combine(call.facts, operands, ["n", "g", "o", *kept], call.why)
    shape = call.out.shape
    out = view(call.facts, out, [*shape[:2], *(shape[d] for d in alone)], call.why)
    if call.get("bias") is not None:
        out = combine(call.facts, [(out, ["n", "c", *kept]), (call.layout("bias"), "c")], ["n", "c", *kept], call.why)
    own = dict(zip(alone, out.dims[2:], strict=True))
    frozen = {d: (Fine(shape[d], FROZEN),) if shape[d] > 1 else () for d in spatial}
    return out.with_dims((*out.dims[:2], *({**frozen, **own}[d] for d in spatial)))


@rule("torchvision.deform_conv2d")
def deformable(call: Call) -> Layout:
    """A convolution that reads where data say: offsets and masks are fixed, and so are groups of channels."""
    x, w = call.freeze_dims(call.layout("input"), [2, 3]), call.freeze_dims(call.layout("weight"), [2, 3])
    for name in ("offset", "mask"):
        where = call.layout(name)
        call.freeze_dims(where, range(len(where.dims)))
    if call["groups"] > 1 or call["offset_groups"] > 1:
        x = call.freeze_dims(x, [1])
        w = call.freeze_dims(w, [0, 1])
        inner = "j"  # a part of the input's channels
    else:
        inner = "i"
    out = combine(call.facts, [(x, "nihw"), (w, ["o", inner, "k", "l"])], "no", call.why)
    out = combine(call.facts, [(out, "no"), (call.layout("bias"), "o")], "no", call.why)
    return out.with_dims((*out.dims, *((Fine(n, FROZEN),) if n > 1 else () for n in call.out.shape[2:])))


def _each(value: Sequence[int] | int, dim: int) -> int:
    """The entry of a stride or padding for a dimension of the input; one entry may stand for all."""
    values = [value] if isinstance(value, int) else list(value)
    return values[dim - 2] if len(values) > 1 else values[0]


@rule(
    "scaled_dot_product_attention",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
def attention(call: Call) -> list[Layout | None]:
    """softmax(q kᵀ) v, for the kernels that hide it; query heads may share a key head."""
    q, k, v = call.layout("query"), call.layout("key"), call.layout("value")
    hq, hk = q.shape[-3], k.shape[-3]
    r = max(hq // hk, 1)
    q = view(call.facts, q, [*q.shape[:-3], hk, r, *q.shape[-2:]], call.why)
    lead = [f"b{d}" for d in range(len(k.dims) - 3)]
    heads = [*lead, "h"]
    scores = combine(
        call.facts,
        [(q, [*heads, "r", "l", "e"]), (k, [*heads, "m", "e"])],
        [*heads, "r", "l", "m"],
        call.why,
    )
    mask = call.get("attn_mask") if call.get("attn_mask") is not None else call.get("attn_bias")
    if mask is not None:
        m = call.layout_of(mask)
        flat = view(call.facts, scores, [*scores.shape[: len(lead)], hq, *scores.shape[-2:]], call.why)
        flat = elementwise(call.facts, [flat, m], len(flat.dims), call.why)
        scores = view(call.facts, flat, scores.shape, call.why)
    out = combine(
        call.facts,
        [(scores, [*heads, "r", "l", "m"]), (v, [*heads, "m", "d"])],
        [*heads, "r", "l", "d"],
        call.why,
    )
    first = view(call.facts, out, call.outputs()[0].shape, call.why)
    return [first, *(None for _ in call.outputs()[1:])]
