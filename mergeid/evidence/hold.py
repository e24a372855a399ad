"""How firmly the fixed parts of some tensors hold the neurons that they write, without data.

A tensor's rows are F + D ⊙ W, with the fixed part F that both models share. It is judged as if the inputs were
isotropic (P = I) and every entry trainable at one price (D = 1): with D in {0, c}, as asymmetric layers have it, the
true costs of a layer are these over c², or infinite, so that its margins are no smaller. Then the costs of several
tensors add up to those of their rows put side by side, C_ij = ‖w_j − f_i‖², and a swap costs
T_ij = 2⟨w_i − w_j, f_i − f_j⟩, w effective.

A positive margin is not enough. Where the trained part outweighs the fixed one, F is still found in the weights (it is
stored there), but it is not what the neurons do. So the *angle* between w_i − w_j and f_i − f_j must be below 45° for
every two neurons in both models: then w^A_i − w^A_j and w^B_i − w^B_j are less than 90° apart, and no swap brings B
nearer to A, whatever the two trainings did. It says that of any two neurons' difference no more was trained than fixed
(with a trained part at right angles to F, the tangent of the angle is ‖trained‖/‖fixed‖). Beyond swaps, the identity
must be the only cheapest order of each model in its classes, and the order of B that is nearest to A.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import acos, degrees

import numpy as np
import torch
from torch import Tensor

from mergeid.evidence.margin import margin
from mergeid.evidence.writers import Writer
from mergeid.neuron_graph.neuron_graph import AxisMap, Space
from mergeid.nn.names import FIXED, MASK

WIDEST = 45.0
"""Degrees: the widest angle at which two models' neurons cannot be nearer in another order."""
VALUES = 1 << 24
"""Float64 values that are held at once (128 MB) per sum of products."""

Read = Callable[[str, str], "Tensor | None"]
"""(space id, tensor) -> the tensor of a model in the order that this space is judged in; None where it has none."""


@dataclass(frozen=True)
class Hold:
    """How firmly fixed parts hold neurons in place. Angles in degrees, the widest over all pairs, 90 at least where a
    pair is not held at all. `nearest`: whether the order as it is is the only one that fits A's, and B's fixed parts
    best, and brings B nearest to A. `names`: writers with a fixed part."""

    angle_a: float
    angle_b: float
    nearest: tuple[bool, bool, bool]
    names: tuple[str, ...]

    @property
    def firm(self) -> bool:
        return bool(self.names) and max(self.angle_a, self.angle_b) < WIDEST and all(self.nearest)

    def __and__(self, other: Hold) -> Hold:
        return Hold(
            max(self.angle_a, other.angle_a),
            max(self.angle_b, other.angle_b),
            tuple(x and y for x, y in zip(self.nearest, other.nearest, strict=True)),  # type: ignore[arg-type]
            (*self.names, *other.names),
        )


LOOSE = Hold(180.0, 180.0, (False, False, False), ())


class Fixed:
    """The effective weights of both models and the fixed part that they share, tensor by tensor: what both store, else
    the base's, else the tensor itself where no training has touched it (a sinusoidal table), for then it is equal.

    Args:
        a, b: read a tensor of the state dicts. base: of what both started from.
    """

    def __init__(self, a: Read, b: Read, base: Read | None = None) -> None:
        self.a, self.b, self.base = a, b, base
        self._shared: dict[tuple[str, str], bool] = {}

    def differ(self, space: str, tensor: str) -> bool:
        """Whether the models store other parts of this tensor, or only one of them does."""
        return not all(_equal(self.a(space, n), self.b(space, n)) for n in (tensor + FIXED, tensor + MASK))

    def has(self, space: str, tensor: str) -> bool:
        """Whether both models share a fixed part of this tensor."""
        key = space, tensor
        if key not in self._shared:
            self._shared[key] = not self.differ(space, tensor) and (
                self.a(space, tensor + FIXED) is not None
                or (self.base is not None and self.base(space, tensor) is not None)
                or self._untrained(space, tensor)
            )
        return self._shared[key]

    def _untrained(self, space: str, tensor: str) -> bool:
        """Equal in both, and not one value everywhere, as tables and gains start with that training may not reach."""
        value = self.a(space, tensor)
        if value is None or not _equal(value, self.b(space, tensor)):
            return False
        return bool((value != value.reshape(-1)[0]).any())

    def of(self, space: str, tensor: str) -> Tensor | None:
        """F; None where nothing is shared."""
        if not self.has(space, tensor):
            return None
        stored = self.a(space, tensor + FIXED)
        if stored is not None:
            return stored
        if self.base is not None and self.base(space, tensor) is not None:
            return effective(self.base, space, tensor)
        return self.a(space, tensor)

    def rows(self, space: Space, writer: Writer) -> tuple[Tensor, Tensor, Tensor | None]:
        """Effective weights of A and of B, and F (None: no fixed part is shared), one neuron per row."""
        name = writer.tensor
        fixed = self.of(space.id, name)
        one, two = effective(self.a, space.id, name), effective(self.b, space.id, name)
        return (
            _rows(one, writer.axis, space.size),
            _rows(two, writer.axis, space.size),
            None if fixed is None or fixed.shape != one.shape else _rows(fixed, writer.axis, space.size),
        )


def _equal(one: Tensor | None, two: Tensor | None) -> bool:
    return one is two or (one is not None and two is not None and torch.equal(one, two))


def effective(read: Read, space: str, name: str) -> Tensor:
    """F + D ⊙ W, or the tensor itself."""
    weight, fixed, mask = (read(space, n) for n in (name, name + FIXED, name + MASK))
    assert weight is not None
    if fixed is None:
        return weight
    return fixed + (weight if mask is None else mask * weight)


def _rows(tensor: Tensor, axis: AxisMap, size: int) -> Tensor:
    """[neurons of the space, entries]; neurons that are not on the axis have zeros."""
    flat = tensor.movedim(axis.axis, 0).reshape(tensor.shape[axis.axis], -1)
    found = flat[torch.from_numpy(axis.positions.reshape(-1))].reshape(len(axis.members), -1)
    if len(axis.members) == size:
        return found
    out = found.new_zeros(size, found.shape[1])
    out[torch.from_numpy(axis.members)] = found
    return out


def hold(fixed: Fixed, space: Space, writers: Sequence[Writer], *, across: bool = False) -> Hold:
    """How firmly the writers' fixed parts hold a space's neurons.

    Args:
        across: neurons may trade places with those of other blocks too, as they do where their parents move.
    """
    names = tuple(w.tensor for w in writers if fixed.has(space.id, w.tensor))
    if not names:
        return LOOSE
    rows = _Rows(fixed, space, writers)
    blocks = torch.zeros(space.size, dtype=torch.int64) if across else torch.arange(space.size) // space.members
    angles = [0.0, 0.0]
    dominant = np.ones((3, 2), bool)
    norms = [_diagonals(rows, x, y) for x, y in ((0, 0), (1, 1), (2, 2), (2, 0), (2, 1), (0, 1))]
    a, b, f, fa, fb, ab = norms
    for part in torch.arange(space.size).split(max(VALUES // space.size, 1)):
        other = (blocks[part, None] == blocks[None]) & (part[:, None] != torch.arange(space.size)[None])
        if not bool(other.any()):
            continue
        between_f = _between(rows, 2, f, part)
        for side, own, with_f in ((0, a, fa), (1, b, fb)):
            into, out = _both_ways(rows, 2, side, part)
            swap = with_f[part, None] + with_f[None] - into - out
            size = (_between(rows, side, own, part) * between_f).clamp(min=0).sqrt()
            cosine = torch.where(size > 1e-12 * (own.max() * f.max()).sqrt(), swap / size, 0.0)
            cosine.nan_to_num_(nan=-1.0)  # weights that are not finite hold nothing
            angles[side] = max(angles[side], degrees(acos(min(1.0, float(cosine[other].min().clamp(min=-1))))))
            dominant[side] &= _dominates(own, f, with_f, (into, out), part, other)
        dominant[2] &= _dominates(b, a, ab, _both_ways(rows, 0, 1, part), part, other)
    nearest = [bool(d.any()) for d in dominant]
    if max(angles) < WIDEST:
        # dominance is enough, not needed
        for k, (x, y) in enumerate(((2, 0), (2, 1), (0, 1))):
            nearest[k] = nearest[k] or _optimal(rows, x, y, norms, blocks)
    return Hold(angles[0], angles[1], (nearest[0], nearest[1], nearest[2]), names)


@dataclass(frozen=True)
class _Rows:
    """The rows of A, B and F side by side over all writers, one writer at a time in memory."""

    fixed: Fixed
    space: Space
    writers: Sequence[Writer]

    def columns(self, one: int, two: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows of two of (A, B, F), piece by piece of their entries, float64."""
        for writer in self.writers:
            triple = self.fixed.rows(self.space, writer)
            x, y = triple[one], triple[two]
            if x is None or y is None:
                continue
            if x.is_complex():
                x, y = (torch.view_as_real(v.resolve_conj()).flatten(1) for v in (x, y))
            step = max(VALUES // len(x), 1)
            for start in range(0, x.shape[1], step):
                yield x[:, start : start + step].double(), y[:, start : start + step].double()


def _diagonals(rows: _Rows, one: int, two: int) -> Tensor:
    out = torch.zeros(rows.space.size, dtype=torch.float64)
    for x, y in rows.columns(one, two):
        out += (x * y).sum(1)
    return out


def _products(rows: _Rows, one: int, two: int, part: Tensor) -> Tensor:
    """⟨x_i, y_j⟩ at [i in part, j]."""
    out = torch.zeros(len(part), rows.space.size, dtype=torch.float64)
    for x, y in rows.columns(one, two):
        out += x[part] @ y.T
    return out


def _both_ways(rows: _Rows, one: int, two: int, part: Tensor) -> tuple[Tensor, Tensor]:
    """⟨x_i, y_j⟩ and ⟨y_i, x_j⟩ at [i in part, j]."""
    found = _products(rows, one, two, part)
    return found, found.T if len(part) == found.shape[1] else _products(rows, two, one, part)


def _between(rows: _Rows, side: int, norms: Tensor, part: Tensor) -> Tensor:
    """‖x_i − x_j‖²."""
    return (norms[part, None] + norms[None] - 2 * _products(rows, side, side, part)).clamp_(min=0)


def _dominates(
    own: Tensor, classes: Tensor, paired: Tensor, ways: tuple[Tensor, Tensor], part: Tensor, other: Tensor
) -> np.ndarray:
    """Whether every class is nearest to its own neuron, and every neuron to its own class, bool [2]: either proves that
    the identity is the only cheapest order. `ways`: ⟨class_i, neuron_j⟩ and ⟨neuron_i, class_j⟩."""
    into, out = ways
    mine = (own + classes - 2 * paired)[part, None]
    by_class = own[None] + classes[part, None] - 2 * into
    by_neuron = own[part, None] + classes[None] - 2 * out
    return np.array([bool((by_class > mine)[other].all()), bool((by_neuron > mine)[other].all())])


def _optimal(rows: _Rows, classes: int, side: int, norms: Sequence[Tensor], blocks: Tensor) -> bool:
    """The exact margin, block by block."""
    squares = {0: norms[0], 1: norms[1], 2: norms[2]}
    for block in blocks.unique():
        at = torch.nonzero(blocks == block).reshape(-1)
        cost = squares[classes][at, None] + squares[side][at][None] - 2 * _products(rows, classes, side, at)[:, at]
        if len(at) > 1 and not margin(cost.clamp_(min=0)).identifiable:
            return False
    return True
