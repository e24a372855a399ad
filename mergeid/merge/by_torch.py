"""Merging with torch: any method, permuted tensors, replaced tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mergeid.errors import MergeidError
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.dtypes import dtype_name, torch_dtype
from mergeid.merge.compare import TensorPlan
from mergeid.merge.methods import MergeMethod
from mergeid.merge.refusals import not_finite, overflows

CHUNK = 1 << 15
"""Elements merged at once: small enough for the cache, and for torch not to wake its threads (twice as fast)."""


class TorchMerge:
    """Yields the tensors of the result, in pieces."""

    def __init__(
        self,
        a: Checkpoint,
        b: Checkpoint,
        plan: TensorPlan,
        weights: Sequence[float],
        method: MergeMethod,
        transform_b: Callable[[str, Tensor], Tensor] | None,
        overrides: Mapping[str, Tensor],
    ) -> None:
        self.a, self.b, self.plan = a, b, plan
        self.weights, self.method, self.transform_b, self.overrides = weights, method, transform_b, overrides
        self.taken_from_a: list[str] = []
        self.overridden = tuple(overrides)
        self._merged, self._compared = set(plan.merged), set(plan.compared)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The merged tensor, flat, in pieces of at most `CHUNK` elements where the method allows."""
        out = torch_dtype(self.plan.dtypes.get(name, self.a.table[name].dtype))
        if name in self.overrides:
            yield self.overrides[name].to(out)
            return
        ours = self.a.tensor(name)
        if name in self._merged:
            yield from self._merge(name, ours, self._theirs(name), out)
            return
        if name in self._compared and not _equal(ours, self._theirs(name)):
            self.taken_from_a.append(name)
        yield ours

    def _theirs(self, name: str) -> Tensor:
        tensor = self.b.tensor(name)
        if self.transform_b is None:
            return tensor
        moved = self.transform_b(name, tensor)
        if moved.shape != tensor.shape:
            raise ValueError(f"transform_b made {tuple(moved.shape)} of {name!r} {tuple(tensor.shape)}")
        return moved

    def _merge(self, name: str, ours: Tensor, theirs: Tensor, out: torch.dtype) -> Iterator[Tensor]:
        pairs: Iterable[tuple[Tensor, Tensor]] = [(ours, theirs)]
        if self.method.elementwise:
            pairs = zip(ours.reshape(-1).split(CHUNK), theirs.reshape(-1).split(CHUNK), strict=True)
        for pair in pairs:
            result = self.method(pair, self.weights).to(out)
            # NaN and infinity in an input always show in a weighted sum; other methods may drop them.
            seen = [result] if self.method.name == "linear" else [result, *pair]
            if not all(_finite(t) for t in seen):
                raise MergeidError(self._why(name, pair, out))
            yield result

    def _why(self, name: str, pair: tuple[Tensor, Tensor], out: torch.dtype) -> str:
        for tensor, checkpoint in zip(pair, (self.a, self.b), strict=True):
            if not _finite(tensor):
                return not_finite(name, checkpoint, nan=bool(torch.isnan(tensor).any()))
        return overflows(name, dtype_name(out), self.weights)


def check_finite(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """To be called before models are built and compared: a merge without a plan checks while it writes.

    Args:
        checkpoint: whose tensors to read, one at a time.
        names: those that will be merged; integers among them pass.

    Raises:
        MergeidError: one of them holds NaN or an infinite number.
    """
    for name in names:
        tensor = checkpoint.tensor(name)
        if (tensor.is_floating_point() or tensor.is_complex()) and not _finite(tensor):
            raise MergeidError(not_finite(name, checkpoint, nan=bool(torch.isnan(tensor).any())))


def _finite(tensor: Tensor) -> bool:
    """No NaN, no infinity: one pass without a temporary (both propagate into the extremes)."""
    if tensor.numel() == 0:
        return True
    if tensor.is_complex():
        return bool(torch.isfinite(tensor).all())
    low, high = torch.aminmax(tensor)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(ours, theirs) if ours.dtype == theirs.dtype else bool((ours == theirs).all())
