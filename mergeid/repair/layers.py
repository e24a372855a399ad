"""What one operation on weights and activations computes, as rows to fit: which operations can be solved, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mergeid.basics.on_demand import OnDemand
from mergeid.repair.closed_form import Fit
from mergeid.repair.made import Derived
from mergeid.repair.paced import Stop

WIDE, BLOCK = 1 << 25, 1 << 24
"""Numbers beyond which an answer is not held; numbers of it that are formed at a time then."""
DEAD = 1e-6
"""A channel that counts less than that share of the largest is not fitted."""
Rows = Callable[[int, Tensor, Tensor | None], Tensor]
"""(Part, input or answer of the call, chosen positions or None) -> [examples, positions, …]."""


@dataclass(frozen=True)
class Order:
    """How the examples lie in the rows of a tensor: [outer, examples, inner], flattened or not.

    Attributes:
        examples: in the batch. outer: positions that come before them; 1 where they are the first dimension.
    """

    examples: int
    outer: int = 1

    def fits(self, rows: int) -> bool:
        """Whether so many rows can lie in that order."""
        return self.examples > 0 and rows % (self.examples * self.outer) == 0

    def leads(self, x: Tensor) -> bool:
        """Whether the examples are the first dimension of a tensor."""
        return self.outer == 1 and len(x) == self.examples

    def split(self, x: Tensor) -> Tensor:
        """[…, d] as [examples, positions, d]."""
        inner = x.numel() // (x.shape[-1] * self.examples * self.outer)
        return x.reshape(self.outer, self.examples, inner, x.shape[-1]).transpose(0, 1).flatten(1, 2)


@dataclass(frozen=True)
class Part:
    """One linear map inside an operation.

    Attributes:
        weight: [m, …], a view of the parameter (writing into it changes the parameter), or computed from parameters.
        bias: [m], likewise a view, or None.
        alone: every output has one input of its own (norms): weight [m], inputs and answers of equal width.
        turned: the operation takes the weight transposed.
        derived: how the weight is computed, where it is no parameter.
        gain: [m], what the answers are multiplied by before they are compared; None: nothing.
        free: a shift that is fitted later is added to the answers, so that only their centred part counts.
    """

    weight: Tensor
    bias: Tensor | None
    alone: bool = False
    turned: bool = False
    derived: Derived | None = None
    gain: Tensor | None = None
    free: bool = False

    def write(self, found: Fit) -> None:
        """Put new values where the old ones lie; a computed weight and the parameters that it comes from are both
        replaced, since it was computed before."""
        weight, bias = found.weight, found.bias
        if self.gain is not None:
            alive = self.gain.abs() > DEAD * self.gain.abs().max()
            kept = self.weight.reshape(weight.shape).to(weight)
            each = self.gain.double().reshape(-1, *[1] * (weight.dim() - 1)).to(weight)
            weight = torch.where(alive.reshape(each.shape), weight / each, kept)
            if bias is not None and self.bias is not None:
                bias = torch.where(alive, bias / self.gain.to(bias), self.bias.to(bias))
        self.weight.copy_(weight.reshape(self.weight.shape))
        if self.derived is not None:
            for name, leaf in self.derived.leaves.items():
                leaf.copy_(found.leaves[name])
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def remade(self, values: Mapping[str, Tensor]) -> Tensor:
        """The matrix [m, d] (of norms [m]) that other values of its parameters give."""
        assert self.derived is not None
        made = self.derived.remake(values)
        made = made.mT if self.turned else made
        made = made.reshape(made.shape[-self.weight.dim() :])  # a stack of one matrix
        return self._amplified(made if self.alone else made.reshape(len(made), -1))

    @property
    def matrix(self) -> Tensor:
        """[m, d]; of norms [m]; times the gain."""
        return self._amplified(self.weight if self.alone else self.weight.reshape(len(self.weight), -1))

    @property
    def offset(self) -> Tensor | None:
        """The bias times the gain."""
        return None if self.bias is None else self._amplified(self.bias)

    def _amplified(self, values: Tensor) -> Tensor:
        if self.gain is None:
            return values
        return self.gain.to(values).reshape(-1, *[1] * (values.dim() - 1)) * values


@dataclass(frozen=True)
class Layer:
    """A solvable operation at which a network rests.

    Attributes:
        parts: its linear maps (one per group or expert).
        positions: how many rows an example has.
        inputs: of a part [examples, positions, d]; answers: its own [examples, positions, m].
        source: the input tensor of the call.
        by_model: whether each part belongs to the model of that number.
    """

    parts: list[Part]
    positions: int
    inputs: Rows
    answers: Rows
    source: Tensor
    by_model: bool = False


def by_model(layer: Layer, sizes: Sequence[int]) -> Layer:
    """A layer of one part as one part per model: so many of its outputs are each model's."""
    (whole,) = layer.parts
    offsets = [None] * len(sizes) if whole.bias is None else whole.bias.split(list(sizes))
    parts = [Part(w, b, turned=whole.turned) for w, b in zip(whole.weight.split(list(sizes)), offsets, strict=True)]

    def inputs(part: int, source: Tensor, at: Tensor | None) -> Tensor:
        return layer.inputs(0, source, at)

    def answers(part: int, answer: Tensor, at: Tensor | None) -> Tensor:
        own: Tensor = layer.answers(0, answer, at).split(list(sizes), -1)[part]
        return own

    return replace(layer, parts=parts, inputs=inputs, answers=answers, by_model=True)


def layer_of(stop: Stop, examples: int, outer: int = 1) -> Layer | None:
    """The layer that an operation is, None where it is none that can be solved.

    Args:
        examples: in the batch.
        outer: of the `Order` in which they lie (`mergeid.repair.orders`)."""
    make = KINDS.get(stop.name)
    layer = make(stop, Order(examples, outer)) if make is not None else None
    if layer is None or not stop.derived:
        return layer
    (derived, *more), (part, *others) = stop.derived.values(), layer.parts
    whole = part.weight.numel() == sum(stop.args[at].numel() for at in stop.derived)
    return replace(layer, parts=[replace(part, derived=derived)]) if whole and not (more or others) else None


def _picked(x: Tensor, at: Tensor | None) -> Tensor:
    return x if at is None else x[:, at]


def _matmul(stop: Stop, order: Order, left: int, right: int, bias: Tensor | None) -> Layer | None:
    """left @ right, one of which is a weight; three dimensions are as many products."""
    a, b = stop.args[left], stop.args[right]
    turned = left in stop.weights
    if turned == (right in stop.weights):
        return None
    x, w = (b.mT, a) if turned else (a, b.mT)
    if x.dim() == 2:
        x, w = x[None], w[None]
    if len(w) > 1 and w.stride(0) == 0:  # one weight for the whole stack
        x, w = x.reshape(1, -1, x.shape[-1]), w[:1]
    stacked = len(w)
    if not order.fits(x.shape[1]) or len(x) != stacked:
        return None

    def inputs(part: int, source: Tensor, at: Tensor | None) -> Tensor:
        x = (source.mT if turned else source).reshape(stacked, -1, source.shape[-2 if turned else -1])
        return _picked(order.split(x[0 if stop.block else part]), at)

    def answers(part: int, answer: Tensor, at: Tensor | None) -> Tensor:
        if stop.block:
            answer, part = answer[:, part * stop.block : (part + 1) * stop.block], 0
        out = answer.mT if turned else answer
        return _picked(order.split(out.reshape(stacked, -1, out.shape[-1])[part]), at)

    parts = [Part(m, bias, turned=not turned) for m in w]
    if stop.block:
        pieces = parts[0].weight.split(stop.block)
        offsets = [None] * len(pieces) if bias is None else bias.split(stop.block)
        parts = [Part(piece, offset, turned=True) for piece, offset in zip(pieces, offsets, strict=True)]
    return Layer(parts, x.shape[1] // order.examples, inputs, answers, b if turned else a)


def block_of(stop: Stop) -> int:
    """Columns of an operation's answer that are to be looked at together; 0: all of it is held.

    Args:
        stop: with the answer's shape.
    """
    size = prod(stop.shape)
    right = {"mm": {1}, "addmm": {0, 2}}.get(stop.name)
    return max(BLOCK // stop.shape[0], 1) if size > WIDE and set(stop.weights) == right else 0


def answer_of(stop: Stop) -> Tensor:
    """What an operation answers; formed a block at a time where the network rests before it."""
    if not stop.block:
        answer: Tensor = stop.out[0] if isinstance(stop.out, (tuple, list)) else stop.out
        return answer
    *bias, x, weight = stop.args

    def columns(which: Any) -> Tensor:
        begin, end, _ = which.indices(weight.shape[1])
        part = weight.narrow(1, begin, end - begin)
        out = x @ part if not bias else torch.addmm(bias[0][begin:end], x, part)
        return out.t()

    return OnDemand(columns, (len(x), weight.shape[1]), x.dtype, x.device, turned=True)


def _mm(stop: Stop, order: Order) -> Layer | None:
    return _matmul(stop, order, 0, 1, None)


def _addmm(stop: Stop, order: Order) -> Layer | None:
    bias = stop.args[0]
    plain = all(stop.kwargs.get(k, 1) == 1 for k in ("beta", "alpha"))
    if 0 not in stop.weights or 2 not in stop.weights or bias.dim() != 1 or not plain:
        return None
    return _matmul(stop, order, 1, 2, bias)


def _convolution(stop: Stop, order: Order) -> Layer | None:
    x, w, bias, stride, padding, dilation, transposed, more, groups = stop.args[:9]
    if 1 not in stop.weights or (bias is not None and 2 not in stop.weights) or not order.leads(x):
        return None
    if transposed and stop.derived:
        return None
    nd = w.dim() - 2
    stride, padding, dilation, more = (_each(v, nd) for v in (stride, padding, dilation, more))
    span = [dilation[i] * (w.shape[2 + i] - 1) for i in range(nd)]
    if transposed:  # an ordinary one over inputs that lie apart, with the kernel turned round
        seen = [(x.shape[2 + i] - 1) * stride[i] + 1 for i in range(nd)]
        pads = [(span[i] - padding[i], span[i] - padding[i] + more[i]) for i in range(nd)]
        step = [1] * nd
    else:
        seen, step = list(x.shape[2:]), stride
        pads = [(p, p) for p in padding]
    out = [(seen[i] + sum(pads[i]) - span[i] - 1) // step[i] + 1 for i in range(nd)]
    count = 1
    for n in out:
        count *= n
    wide = w.shape[1] if transposed else len(w) // groups

    def chosen(channels_last: Tensor, at: Tensor | None) -> Tensor:
        """[examples, positions…, …] at some positions, or all."""
        if at is None:
            return channels_last.reshape(len(channels_last), count, *channels_last.shape[1 + nd :])
        where: tuple[Any, ...] = (slice(None), *torch.unravel_index(at, tuple(out)))
        return channels_last[where]

    def inputs(part: int, source: Tensor, at: Tensor | None) -> Tensor:
        each = source.shape[1] // groups
        h = source[:, part * each : (part + 1) * each]
        if transposed:
            apart = h.new_zeros(*h.shape[:2], *seen)
            spread: tuple[Any, ...] = (..., *(slice(None, None, s) for s in stride))
            apart[spread] = h
            h = apart
        h = F.pad(h, [p for both in reversed(pads) for p in both])
        for i in range(nd):
            h = h.unfold(2 + i, span[i] + 1, step[i])
        taps: list[Any] = [slice(None), slice(None)] + [slice(None)] * nd
        taps += [slice(None, None, dilation[i]) for i in range(nd)]
        h = h[tuple(taps)].movedim(1, 1 + nd)  # [examples, positions…, channels, kernel…]
        if transposed:
            h = h.flip(tuple(range(2 + nd, 2 + 2 * nd)))
        return chosen(h, at).flatten(2)

    def answers(part: int, answer: Tensor, at: Tensor | None) -> Tensor:
        return chosen(answer[:, part * wide : (part + 1) * wide].movedim(1, -1), at)

    inner = len(w) // groups
    kernels = [
        w[g * inner : (g + 1) * inner].transpose(0, 1) if transposed else w[g * wide : (g + 1) * wide]
        for g in range(groups)
    ]
    parts = [Part(k, None if bias is None else bias[g * wide : (g + 1) * wide]) for g, k in enumerate(kernels)]
    return Layer(parts, count, inputs, answers, x)


def _each(value: Sequence[int], nd: int) -> list[int]:
    return list(value) * nd if len(value) == 1 else list(value)


def _channels_first(scaled: Callable[[Tensor], Tensor]) -> tuple[Rows, Rows]:
    def answers(part: int, answer: Tensor, at: Tensor | None) -> Tensor:
        return _picked((answer.flatten(2) if answer.dim() > 2 else answer[..., None]).mT, at)

    return lambda part, source, at: answers(part, scaled(source), at), answers


def _channels_last(order: Order, scaled: Callable[[Tensor], Tensor]) -> tuple[Rows, Rows]:
    def answers(part: int, answer: Tensor, at: Tensor | None) -> Tensor:
        return _picked(order.split(answer), at)

    return lambda part, source, at: answers(part, scaled(source), at), answers


def _batch_norm(stop: Stop, order: Order) -> Layer | None:
    x, weight, bias, mean, variance = stop.args[:5]
    training = stop.args[5] is True
    if training or weight is None or bias is None or not {1, 2} <= set(stop.weights) or not order.leads(x):
        return None
    epsilon = float(stop.args[-1])

    def scaled(h: Tensor) -> Tensor:
        return F.batch_norm(h, mean, variance, None, None, False, 0.0, epsilon)

    positions = x[0].numel() // x.shape[1]
    return Layer([Part(weight, bias, alone=True)], positions, *_channels_first(scaled), x)


def _layer_norm(stop: Stop, order: Order) -> Layer | None:
    x, shape, weight, bias, epsilon = stop.args[:5]
    if weight is None or len(shape) != 1 or 2 not in stop.weights or not order.fits(x.numel() // shape[0]):
        return None

    def scaled(h: Tensor) -> Tensor:
        return F.layer_norm(h, shape, None, None, epsilon)

    positions = x.numel() // shape[0] // order.examples
    return Layer([Part(weight, bias, alone=True)], positions, *_channels_last(order, scaled), x)


def _rms_norm(stop: Stop, order: Order) -> Layer | None:
    """What a GPU makes of an RMSNorm; elsewhere it ends in a product (`_scale`)."""
    x, shape, weight, epsilon = stop.args[:4]
    if weight is None or len(shape) != 1 or set(stop.weights) != {2} or not order.fits(x.numel() // shape[0]):
        return None

    def scaled(h: Tensor) -> Tensor:
        return F.rms_norm(h, shape, None, epsilon)

    positions = x.numel() // shape[0] // order.examples
    return Layer([Part(weight, None, alone=True)], positions, *_channels_last(order, scaled), x)


def _group_norm(stop: Stop, order: Order) -> Layer | None:
    x, weight, bias = stop.args[:3]
    groups, epsilon = stop.args[6], stop.args[7]
    if weight is None or bias is None or 1 not in stop.weights or not order.leads(x):
        return None

    def scaled(h: Tensor) -> Tensor:
        return F.group_norm(h, groups, None, None, epsilon)

    positions = x[0].numel() // x.shape[1]
    return Layer([Part(weight, bias, alone=True)], positions, *_channels_first(scaled), x)


def _scale(stop: Stop, order: Order) -> Layer | None:
    """Activations times a vector over the last dimension: the end of an RMSNorm, LayerScale."""
    (at,) = stop.weights if len(stop.weights) == 1 else (None,)
    if at is None or len(stop.args) != 2:
        return None
    w, x = stop.args[at], stop.args[1 - at]
    fits = isinstance(x, Tensor) and w.dim() == 1 and x.dim() >= 2 and x.shape[-1] == len(w) > 1
    if not fits or not order.fits(x.numel() // len(w)):
        return None
    positions = x.numel() // len(w) // order.examples
    return Layer([Part(w, None, alone=True)], positions, *_channels_last(order, lambda h: h), x)


KINDS: dict[str, Callable[[Stop, Order], Layer | None]] = {
    "mm": _mm,
    "bmm": _mm,
    "addmm": _addmm,
    "convolution": _convolution,
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "cudnn_batch_norm": _batch_norm,
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "_fused_rms_norm": _rms_norm,
    "mul": _scale,
}
