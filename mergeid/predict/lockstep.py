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

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

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
        leaves: its arguments, flattened; activations are copies.
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
        leaves = list(self.leaves)
        for i, x in zip(self.active, inputs, strict=True):
            # some operations write into their argument
            leaves[i] = x.clone() if isinstance(x, Tensor) else x
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
        super().__init__()
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
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        names = tuple(dict.fromkeys(n for t in tensors for n in self.of_weights.get(t, ())))
        live = any(t in self.of_data for t in tensors)
        if names and live:
            index, self.count = self.count, self.count + 1
            out = self.step(self, index, func, args, kwargs, names)
        else:
            out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                if live:
                    self.of_data[leaf] = True
                elif names and leaf not in self.of_weights:
                    self.of_weights[leaf] = names
        return out


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
    mode = _Seen(dict(model.state_dict(keep_vars=True)), batch, step)
    with torch.no_grad(), _plain_paths(), mode:
        out = forward(model, batch)
    return out, mode.count


def watch(model: nn.Module, forward: Forward, batch: Any) -> tuple[Tensor, list[Operation]]:
    """The output of a model as it is, and its operations on weights and activations in order."""
    seen: list[Operation] = []

    def step(mode: _Seen, index: int, func: Any, args: Any, kwargs: Any, names: tuple[str, ...]) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        active = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x in mode.of_data]
        for i in active:
            leaves[i] = leaves[i].clone()
        out = func(*args, **kwargs)
        seen.append(Operation(func, spec, leaves, active, names, first(out).clone()))
        return out

    return _run(model, forward, batch, step)[0], seen


def corrected(
    model: nn.Module,
    forward: Forward,
    batch: Any,
    corrections: Sequence[Tensor | None],
    *,
    fresh: bool,
    damping: Sequence[float],
) -> Tensor:
    """The output of a model whose operations' outputs are shifted.

    Args:
        corrections: one per operation, as `watch` counts them.
        fresh: normalise by the statistics of this run in place of the stored ones."""

    def step(mode: _Seen, index: int, func: Any, args: Any, kwargs: Any, names: tuple[str, ...]) -> Any:
        shift = corrections[index] if index < len(corrections) else None
        if fresh and normalises(func):
            out = normalised(func, args)
            return (out if shift is None else out + shift, *(out.new_zeros(0) for _ in func._schema.returns[1:]))
        out = func(*args, **kwargs)
        if shift is not None:
            if damping[index] != 1:
                first(out).mul_(damping[index])
            first(out).add_(shift)
        return out

    out, count = _run(model, forward, batch, step)
    if count != len(corrections):
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
        if not middle.is_floating_point():
            return
        chord = (a + b) / 2
        self.deviation += _square(middle - chord)
        self.difference += _square((a - b) / 2)
        self.chord += _square(_about_mean(chord))
        self.own += (_square(_about_mean(a)) + _square(_about_mean(b))) / 2


@dataclass
class Lockstep:
    """What a chunk of examples says of a pair.

    Attributes:
        a, b: own outputs. middle: outputs of the corrected runs of A and of B; fresh: with fresh statistics, or None
            where no operation has stored ones.
        deviations: per operation.
    """

    a: Tensor
    b: Tensor
    middle: tuple[Tensor, Tensor]
    fresh: tuple[Tensor, Tensor] | None
    deviations: list[Deviation] = field(default_factory=list)


@torch.no_grad()
def lockstep(
    a: nn.Module,
    b: nn.Module,
    forward: Forward,
    batch: Any,
    *,
    seen_a: tuple[Tensor, list[Operation]] | None = None,
) -> Lockstep:
    """Run two models, in one order of neurons, on one batch.

    Args:
        seen_a: what `watch` said of A on this batch.

    Raises `PathsDiffer` where they do not execute the same operations."""
    out_a, ops_a = seen_a or watch(a, forward, batch)
    out_b, ops_b = watch(b, forward, batch)
    if [_signature(o) for o in ops_a] != [_signature(o) for o in ops_b]:
        raise PathsDiffer("the two models do not execute the same operations on the same inputs (routed experts?)")
    has_statistics = any(normalises(o.func) for o in ops_a)
    plain, fresh = _Shifts(), _Shifts()
    found: list[Deviation] = []
    for one, two in zip(ops_a, ops_b, strict=True):
        middle = [_average(one.leaves[i], two.leaves[i]) for i in one.active]
        at_a, at_b = one.at(middle, False), two.at(middle, False)
        deviation = Deviation(one.weights)
        deviation.add((at_a + at_b) / 2, one.out, two.out)
        found.append(deviation)
        damping = damp(one, two)
        plain.add(at_a, at_b, damping)
        if has_statistics and normalises(one.func):
            at_a, at_b = one.at(middle, True), two.at(middle, True)
        fresh.add(at_a, at_b, damping)

    def pair(shifts: _Shifts, statistics: bool) -> tuple[Tensor, Tensor]:
        return (
            corrected(a, forward, batch, shifts.a, fresh=statistics, damping=shifts.damping),
            corrected(b, forward, batch, shifts.b, fresh=statistics, damping=shifts.damping),
        )

    return Lockstep(out_a, out_b, pair(plain, False), pair(fresh, True) if has_statistics else None, found)


@dataclass
class _Shifts:
    """What is added to the operations' outputs in the corrected runs."""

    a: list[Tensor | None] = field(default_factory=list)
    b: list[Tensor | None] = field(default_factory=list)
    damping: list[float] = field(default_factory=list)

    def add(self, at_a: Tensor, at_b: Tensor, damping: float) -> None:
        if not at_a.is_floating_point():
            damping = 1.0
        middle = (at_a + at_b) / 2
        for shifts, at in ((self.a, at_a), (self.b, at_b)):
            shifts.append(middle - damping * at if at.is_floating_point() else None)
        self.damping.append(damping)


def damp(one: Operation, two: Operation) -> float:
    """By how much averaging two weight matrices shortens what they make of a deviation e of their inputs.

    Where both networks agree about e, by 1; where e is isotropic, by κ, the root mean square of (W_a + W_b) e / 2 over
    that of W_a e and W_b e. Deviations have something of both: the geometric mean, κ^(1/2)."""
    wa, wb = one.matrix(), two.matrix()
    if wa is None or wb is None:
        return 1.0
    own = (_square(wa) + _square(wb)) / 2
    mean = own / 2 + float((wa.double() * wb.double()).sum()) / 2
    return max(mean / own, 0.0) ** 0.25 if own > 0 else 1.0


def _signature(op: Operation) -> Any:
    return (op.func, tuple(op.active), tuple(tuple(x.shape) for x in op.leaves if isinstance(x, Tensor)))


def _average(x: Any, y: Any) -> Any:
    return (x + y) / 2 if isinstance(x, Tensor) and x.is_floating_point() else x


def _about_mean(x: Tensor) -> Tensor:
    return x - x.mean(0, keepdim=True)


def _square(x: Tensor) -> float:
    return float(x.double().square().sum())
