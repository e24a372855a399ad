"""The weighted sum of two files in NumPy alone.

A plain linear merge needs nothing of torch, and importing torch takes longer and more memory than merging 200 million
parameters. The arithmetic is that of `mergeid.methods.registry.linear`, to the last bit (the tests hold them together).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mergeid.combine.refusals import not_finite, overflows
from mergeid.combine.tensor_plan import TensorPlan
from mergeid.errors import MergeidError
from mergeid.io.dtypes import BITS, NUMPY_KINDS, wider
from mergeid.io.tensors import TensorSource

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

CHUNK = 1 << 16
"""Elements merged at once: all temporaries stay in the cache."""
_HALF, _UPPER, _LAST, _LESS = (np.uint32(n) for n in (16, 0xFFFF0000, 1, 0x7FFF))


def widen(numbers: Array, dtype: str, wide: str) -> Array:
    """A fresh copy of stored numbers (bfloat16 as uint16) in the float format `wide`, exactly."""
    if dtype == "BF16":
        bits = numbers.astype("<u4")
        bits <<= 16
        numbers = bits.view("<f4")
    return numbers.astype(NUMPY_KINDS[wide], copy=dtype != "BF16" or wide != "F32")


def narrow(numbers: Array, dtype: str) -> Array:
    """Floats rounded to nearest, ties to even, as they are stored (bfloat16 as uint16). NaN is not kept for BF16.

    From float64 to 16 bits the way leads over float32, as it does in torch.
    """
    if dtype in ("F16", "BF16"):
        numbers = numbers.astype("<f4", copy=False)
    if dtype != "BF16":
        return numbers.astype(NUMPY_KINDS[dtype], copy=False)
    bits = numbers.view("<u4")
    answer: Array = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    return answer


def weighted_sum(
    numbers: Sequence[Array], dtypes: Sequence[str], weights: Sequence[float], out: str
) -> tuple[Array, bool]:
    """``Σ_i w_i x_i`` as `mergeid.methods.registry.linear` computes it.

    Args:
        numbers: stored numbers of equal length, as `widen` takes them.
        dtypes: their dtypes (F64, F32, F16, BF16).
        weights: one per array.
        out: dtype of the result.

    Returns:
        The stored numbers of the result, and whether all of them are finite (then all inputs are, too).
    """
    promoted = dtypes[0]
    for dtype in dtypes[1:]:
        promoted = wider(promoted, dtype)
    weights = [w + 0.0 for w in weights]  # -0.0 would turn the sign of zeros
    convex = all(0 <= w <= 1 for w in weights)
    wide = "F32" if convex and BITS[promoted] == 16 else "F64"
    if wide == "F32" and {*dtypes, out} == {"BF16"} and (even := numbers[0].size // 2 * 2):
        merged, finite = _halves([array[:even] for array in numbers], weights)
        if even == numbers[0].size:
            return merged, finite
        last, fine = weighted_sum([array[even:] for array in numbers], dtypes, weights, out)
        return np.concatenate([merged, last]), finite and fine
    total = widen(numbers[0], dtypes[0], wide)
    total *= weights[0]
    for array, dtype, weight in zip(numbers[1:], dtypes[1:], weights[1:], strict=True):
        part = widen(array, dtype, wide)
        part *= weight
        total += part
    if (not convex or wide == promoted) and math.isclose(
        math.fsum(weights), 1, abs_tol=1e-9
    ):  # no wider format makes up for the rounding: keep what all agree on
        first = widen(numbers[0], dtypes[0], wide)
        agreed = np.ones(total.shape, bool)
        for array, dtype in zip(numbers[1:], dtypes[1:], strict=True):
            agreed &= first == widen(array, dtype, wide)
        np.copyto(total, first, where=agreed)
    if total.size == 0:
        return narrow(total, out), True
    # Rounding keeps the order, so the extremes tell of overflow; both carry a NaN.
    extremes = np.stack([total.min(), total.max()])
    finite = bool(np.isfinite(extremes).all())
    stored = narrow(widen(narrow(extremes, promoted), promoted, "F64"), out)
    finite = finite and bool(np.isfinite(widen(stored, out, "F64")).all())
    if promoted != out:
        total = widen(narrow(total, promoted), promoted, "F64" if BITS[out] > 16 else "F32")
    return narrow(total, out), finite


def _halves(numbers: Sequence[Array], weights: Sequence[float]) -> tuple[Array, bool]:
    """`weighted_sum` of an even number of bfloat16 in a third of the passes: every 32 bits hold two numbers, and each
    is a float32 when the other is shifted or masked out."""
    pairs = [n.view("<u4") for n in numbers]
    low, high = pairs[0] << _HALF, pairs[0] & _UPPER
    part = np.empty_like(low)
    sums, added = (low.view("<f4"), high.view("<f4")), part.view("<f4")
    for total in sums:
        total *= weights[0]
    for pair, weight in zip(pairs[1:], weights[1:], strict=True):
        for total, cut, by in ((sums[0], np.left_shift, _HALF), (sums[1], np.bitwise_and, _UPPER)):
            cut(pair, by, out=part)
            added *= weight
            total += added
    extremes = np.stack([edge for total in sums for edge in (total.min(), total.max())])
    for bits in (low, high):  # to nearest, ties to even
        np.right_shift(bits, _HALF, out=part)
        part &= _LAST
        part += _LESS
        bits += part
    low >>= _HALF
    high &= _UPPER
    low |= high
    return low.view("<u2"), bool(np.isfinite(widen(narrow(extremes, "BF16"), "BF16", "F32")).all())


class NumpyMerge:
    """Yields the merged tensors as bytes, in pieces, straight from the mapped files.

    Args:
        models: the checkpoints; the first gives what is not merged.
        plan: what happens to each tensor.
        weights: tensor name -> one weight per model.
    """

    def __init__(
        self, models: Sequence[TensorSource], plan: TensorPlan, weights: Callable[[str], Sequence[float]]
    ) -> None:
        self.models, self.plan, self.weights = list(models), plan, weights
        self.taken_from_a: list[str] = []
        self.overridden: tuple[str, ...] = ()
        self._merged, self._compared = set(plan.merged), set(plan.compared)

    @staticmethod
    def can(models: Sequence[TensorSource], plan: TensorPlan) -> bool:
        """Whether all that must be computed is within NumPy's means: mapped files, real numbers."""
        return all(c.mapped for c in models) and all(
            c.table[n].dtype in NUMPY_KINDS for c in models for n in plan.merged
        )

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The bytes of one tensor of the result."""
        if name not in self._merged:
            if name in self._compared and not all(self._equal(name, other) for other in self.models[1:]):
                self.taken_from_a.append(name)
            yield self.models[0].raw(name)
            return
        dtypes = [c.table[name].dtype for c in self.models]
        out = self.plan.dtypes.get(name, dtypes[0])
        weights = self.weights(name)
        arrays = [np.frombuffer(c.raw(name), NUMPY_KINDS[d]) for c, d in zip(self.models, dtypes, strict=True)]
        with np.errstate(all="ignore"):  # what overflows or is no number is found and named below
            for at in range(0, arrays[0].size, CHUNK):
                numbers = [array[at : at + CHUNK] for array in arrays]
                result, finite = weighted_sum(numbers, dtypes, weights, out)
                if not finite:
                    raise MergeidError(self._why(name, numbers, dtypes, out))
                yield result.view("u1").data

    def _equal(self, name: str, other: TensorSource) -> bool:
        pair = (self.models[0], other)
        ours, theirs = (np.frombuffer(c.raw(name), NUMPY_KINDS[c.table[name].dtype]) for c in pair)
        return np.array_equal(ours, theirs)

    def _why(self, name: str, numbers: Sequence[Array], dtypes: Sequence[str], out: str) -> str:
        for array, dtype, checkpoint in zip(numbers, dtypes, self.models, strict=True):
            values = widen(array, dtype, "F64")
            if not np.isfinite(values).all():
                return not_finite(name, checkpoint, nan=bool(np.isnan(values).any()))
        return overflows(name, out, self.weights(name))
