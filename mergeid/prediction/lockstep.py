"""Two networks of one architecture on the same inputs, operation by operation, each with its own weights.

Every operation that takes weights and activations is seen, whatever module it lies in. From the two networks' own
activations x_a, x_b at operation k follow

    chord     c_k = (k_a(x_a) + k_b(x_b)) / 2,
    middle    m_k = (k_a(x) + k_b(x)) / 2,  x = (x_a + x_b) / 2,
    deviation m_k - c_k.

For an operation that is linear in its weights, m_k is what averaged weights would answer to averaged activations, so
that m_k - c_k is the chord deviation of that operation alone. A *corrected run* of A is A with its own weights, its
outputs shifted at every operation such that it gives m_k where its activations are the averages. What deviates from
them is carried on by A's own layers, shortened as averaged weights would shorten it (`damp`). No tensor of averaged
weights is ever run, and no network between A and B; the two corrected runs, of A and of B, say to second order in the
difference of the weights what the midpoint would answer, and beyond it they are an estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from mergeid.basics.shelf import Shelf
from mergeid.basics.squares import squares_of, sum_of_squares
from mergeid.basics.state import tensors_of
from mergeid.errors import MergeidError

Forward = Callable[[nn.Module, Any], Tensor]
NORMALISERS = ("aten.native_batch_norm", "aten._native_batch_norm_legit_no_training", "aten.cudnn_batch_norm")
"""Operations with stored statistics that a repair estimates again; all take (x, weight, bias, mean, variance, …)."""


class PathsDiffer(MergeidError):
    """The two networks do not execute the same operations on these inputs."""


@dataclass
class Operation:
    """One executed operation on weights and activations.

    Attributes:
        weights: names of the tensors of the state dict that it takes.
        leaves: its arguments, flattened; activations as they were before it.
        active: which leaves are activations.
        out: its first output.
    """

    func: Any
    spec: Any
    leaves: list[Any]
    active: list[int]
    weights: tuple[str, ...]
    out: Tensor

    def matrix(self) -> Tensor | None:
        """Its first matrix or kernel."""
        still = (x for i, x in enumerate(self.leaves) if i not in self.active)
        return next((x for x in still if isinstance(x, Tensor) and x.dim() >= 2 and x.is_floating_point()), None)

    def at(self, inputs: Sequence[Any], fresh: bool) -> Tensor:
        """The operation's answer to other activations; `fresh`: with normalisation by their own statistics."""
        leaves, writes = list(self.leaves), self.func._schema.is_mutable
        for i, x in zip(self.active, inputs, strict=True):
            leaves[i] = x.clone() if writes and isinstance(x, Tensor) else x
        args, kwargs = tree_unflatten(leaves, self.spec)
        return first(normalised(self.func, args) if fresh and normalises(self.func) else self.func(*args, **kwargs))


def normalises(func: Any) -> bool:
    return str(func.overloadpacket) in NORMALISERS


def normalised(func: Any, args: Any) -> Tensor:
    """A normalisation with stored statistics, by those of this input instead."""
    x, weight, bias = args[:3]
    epsilon = float(args[-1]) if isinstance(args[-1], float) else 1e-5
    return torch.nn.functional.batch_norm(x, None, None, weight, bias, True, 0.0, epsilon)


def first(out: Any) -> Tensor:
    return next(t for t in tree_leaves(out) if isinstance(t, Tensor))


class _Seen(TorchDispatchMode):
    """Tells operations on weights and activations from the others, and hands them to `step`."""

    def __init__(self, state: Mapping[str, Tensor], inputs: Any, step: Callable[..., Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.step = step
        self.of_weights: Any = WeakIdKeyDictionary()
        self.of_data: Any = WeakIdKeyDictionary()
        self.count = 0
        for name, value in state.items():
            if value.is_floating_point() and value not in self.of_weights:
                self.of_weights[value] = (name,)
        for leaf in tree_leaves(inputs):
            if isinstance(leaf, Tensor):
                self.of_data[leaf] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors((*args, *kwargs.values()))
        names = tuple(dict.fromkeys(n for t in tensors for n in self.of_weights.get(t, ())))
        live = any(t in self.of_data for t in tensors)
        if names and live:
            index, self.count = self.count, self.count + 1
            out = self.step(self, index, func, args, kwargs, names)
        else:
            out = func(*args, **kwargs)
        for leaf in _tensors((out,)):
            if live:
                self.of_data[leaf] = True
            elif names and leaf not in self.of_weights:
                self.of_weights[leaf] = names
        return out


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among an operation's arguments or results, which are nested in lists and tuples alone."""
    found: list[Tensor] = []
    for x in values:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += _tensors(x)
    return found


@contextmanager
def _plain_paths() -> Iterator[None]:
    """Fused transformer layers would hide their operations."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _run(model: nn.Module, forward: Forward, batch: Any, step: Callable[..., Any]) -> tuple[Tensor, int]:
    mode = _Seen(tensors_of(model, keep_vars=True), batch, step)
    with torch.no_grad(), _plain_paths(), mode:
        out = forward(model, batch)
    return out, mode.count


Look = Callable[[int, Operation], None]
"""Sees an operation that has just run, and its number. Its activations are written over later."""


def visit(model: nn.Module, forward: Forward, batch: Any, look: Look) -> tuple[Tensor, int]:
    """The output of a model as it is, and how many operations on weights and activations were looked at."""

    def step(mode: _Seen, index: int, func: Any, args: Any, kwargs: Any, names: tuple[str, ...]) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        active = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x in mode.of_data]
        for i in active if func._schema.is_mutable else ():
            leaves[i] = leaves[i].clone()
        out = func(*args, **kwargs)
        look(index, Operation(func, spec, leaves, active, names, first(out)))
        return out

    return _run(model, forward, batch, step)


def watch(model: nn.Module, forward: Forward, batch: Any) -> tuple[Tensor, list[Operation]]:
    """The output of a model as it is, and its operations on weights and activations in order."""
    seen: list[Operation] = []
    kept: Any = WeakIdKeyDictionary()
    shelf = Shelf()

    def keep(x: Tensor) -> Tensor:
        """A copy, one for as long as nothing is written into it: what leaves one operation mostly enters the next."""
        version, copied = kept.get(x, (-1, x))
        if version != x._version:
            version, copied = kept[x] = (x._version, shelf.keep(x))
        answer: Tensor = copied
        return answer

    def look(index: int, op: Operation) -> None:
        for i in op.active:
            op.leaves[i] = keep(op.leaves[i])
        # a write into its argument is counted after this
        op.out = shelf.keep(op.out) if op.func._schema.is_mutable else keep(op.out)
        seen.append(op)

    return visit(model, forward, batch, look)[0], seen


def activation_bytes(model: nn.Module, forward: Forward, batch: Any) -> int:
    """Bytes of all that operations on weights and activations take and return."""
    total = 0

    def look(index: int, op: Operation) -> None:
        nonlocal total
        total += sum(t.numel() * t.element_size() for t in (*(op.leaves[i] for i in op.active), op.out))

    with torch.no_grad():
        visit(model, forward, batch, look)
    return total


@dataclass(frozen=True)
class Shift:
    """What one operation's outputs become in the corrected runs: damping · out + (1 - damping) · middle ± damping ·
    half, so that they are `middle` where the inputs are the averages.

    Attributes:
        middle: mean of the two networks' answers to the averaged inputs; None where that is no float.
        half: half their difference.
    """

    middle: Tensor | None
    half: Tensor | None
    damping: float

    @classmethod
    def of(cls, at_a: Tensor, at_b: Tensor, damping: float, shelf: Shelf) -> Shift:
        if not at_a.is_floating_point():
            return cls(None, None, 1.0)
        half = (at_b - at_a).div_(2)
        if not half.sum().isfinite():
            half.masked_fill_(at_a == at_b, 0.0)  # infinite in both, as a mask: no difference
        return cls(shelf.take((at_a + at_b).div_(2)), shelf.take(half), damping)

    def apply(self, out: Tensor, sign: int) -> None:
        """In place; sign: 1 for A, -1 for B."""
        if self.middle is None or self.half is None:
            return
        if self.damping != 1:
            out.mul_(self.damping).add_(self.middle, alpha=1 - self.damping)
        out.add_(self.half, alpha=sign * self.damping)


def corrected(
    model: nn.Module, forward: Forward, batch: Any, shifts: Sequence[Shift], sign: int, *, fresh: bool
) -> Tensor:
    """The output of a model whose operations' outputs are shifted.

    Args:
        shifts: one per operation, as `watch` counts them. sign: 1 for A, -1 for B.
        fresh: normalise by the statistics of this run in place of the stored ones."""

    def step(mode: _Seen, index: int, func: Any, args: Any, kwargs: Any, names: tuple[str, ...]) -> Any:
        if fresh and normalises(func):
            out = normalised(func, args)
            found = (out, *(out.new_zeros(0) for _ in func._schema.returns[1:]))
        else:
            found = func(*args, **kwargs)
        if index < len(shifts):
            shifts[index].apply(first(found), sign)
        return found

    out, count = _run(model, forward, batch, step)
    if count != len(shifts):
        raise PathsDiffer("the models execute other operations from run to run")
    return out


@dataclass
class Deviation:
    """Sums over the examples for one operation, float64: squares of the deviation m - c, of half the difference of the
    two outputs, of the chord about its mean, and of the two outputs about theirs (mean of both)."""

    weights: tuple[str, ...]
    deviation: float = 0.0
    difference: float = 0.0
    chord: float = 0.0
    own: float = 0.0

    def add(self, middle: Tensor, a: Tensor, b: Tensor) -> None:
        chord, half = (a + b).div_(2), (a - b).div_(2)
        self.deviation += sum_of_squares(middle - chord)
        self.difference += sum_of_squares(half)
        about = sum_of_squares(chord.sub_(chord.mean(0)))
        self.chord += about
        # |a|² + |b|² = 2 |(a + b) / 2|² + 2 |(a - b) / 2|², each about its mean
        self.own += about + sum_of_squares(half.sub_(half.mean(0)))


@dataclass
class Lockstep:
    """What a chunk of examples says of a pair.

    Attributes:
        a, b: own outputs. middle: outputs of the corrected runs of A and of B; fresh: with fresh statistics, or None
            where no operation has stored ones.
        deviations, damping: per operation.
    """

    a: Tensor
    b: Tensor
    middle: tuple[Tensor, Tensor]
    fresh: tuple[Tensor, Tensor] | None
    deviations: list[Deviation]
    damping: list[float]


@torch.no_grad()
def lockstep(
    a: nn.Module,
    b: nn.Module,
    forward: Forward,
    batch: Any,
    *,
    seen_a: tuple[Tensor, list[Operation]] | None = None,
    damping: Sequence[float] | None = None,
) -> Lockstep:
    """Run two models, in one order of neurons, on one batch.

    Args:
        seen_a: what `watch` said of A on this batch.
        damping: that of an earlier batch: it is one of the weights alone.

    Raises `PathsDiffer` where they do not execute the same operations."""
    out_a, ops_a = seen_a or watch(a, forward, batch)
    has_statistics = any(normalises(o.func) for o in ops_a)
    known, damping = damping, []
    plain: list[Shift] = []
    fresh: list[Shift] = []
    deviations: list[Deviation] = []
    shelf, apart = Shelf(), False

    def look(k: int, two: Operation) -> None:
        nonlocal apart
        apart = apart or k >= len(ops_a) or _signature(ops_a[k]) != _signature(two)
        if apart:
            return
        one = ops_a[k]
        damping.append(known[k] if known else damp(one, two))
        middle = [_average(one.leaves[i], two.leaves[i]) for i in one.active]
        shift = Shift.of(one.at(middle, False), two.at(middle, False), damping[k], shelf)
        deviation = Deviation(one.weights)
        if shift.middle is not None:
            deviation.add(shift.middle, one.out, two.out)
        deviations.append(deviation)
        plain.append(shift)
        if has_statistics:
            if normalises(one.func):
                shift = Shift.of(one.at(middle, True), two.at(middle, True), damping[k], shelf)
            fresh.append(shift)

    out_b, count = visit(b, forward, batch, look)
    if apart or count != len(ops_a):
        raise PathsDiffer("the two models do not execute the same operations on the same inputs (routed experts?)")

    def pair(shifts: list[Shift], statistics: bool) -> tuple[Tensor, Tensor]:
        return (
            corrected(a, forward, batch, shifts, 1, fresh=statistics),
            corrected(b, forward, batch, shifts, -1, fresh=statistics),
        )

    both = pair(fresh, True) if has_statistics else None
    return Lockstep(out_a, out_b, pair(plain, False), both, deviations, damping)


def damp(one: Operation, two: Operation) -> float:
    """By how much averaging two weight matrices shortens what they make of a deviation e of their inputs.

    Where both networks agree about e, by 1; where e is isotropic, by κ, the root mean square of (W_a + W_b) e / 2 over
    that of W_a e and W_b e. Deviations have something of both: the geometric mean, κ^(1/2)."""
    wa, wb = one.matrix(), two.matrix()
    if wa is None or wb is None:
        return 1.0
    aa, bb, apart = squares_of(wa, wb)
    own = (aa + bb) / 2
    # |(W_a + W_b) / 2|² by the difference: no averaged weights are made
    return max(1 - apart / 4 / own, 0.0) ** 0.25 if own > 0 and isfinite(apart) else 1.0


def _signature(op: Operation) -> Any:
    return (op.func, tuple(op.active), tuple(tuple(x.shape) for x in op.leaves if isinstance(x, Tensor)))


def _average(x: Any, y: Any) -> Any:
    return (x + y) / 2 if isinstance(x, Tensor) and x.is_floating_point() else x
