"""Merging with torch: any method, permuted tensors, replaced tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergeid.basics.casting import holds_numbers
from mergeid.combine.refusals import not_finite, overflows
from mergeid.combine.tensor_plan import TensorPlan
from mergeid.errors import MergeidError
from mergeid.io.dtypes import dtype_name, torch_dtype
from mergeid.io.tensors import TensorSource
from mergeid.methods.pieces import CHUNK, Pieces, places
from mergeid.methods.pieces import whole as pieced
from mergeid.methods.settings import MergeSettings
from mergeid.methods.statistics import Gram

Transform = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Aligned:
    """A checkpoint whose tensors are read with their neurons in the first model's order.

    Attributes:
        checkpoint: where they lie.
        transform: (name, tensor) -> the same tensor permuted, equal shape; None: as it lies.
    """

    checkpoint: TensorSource
    transform: Transform | None = None

    def tensor(self, name: str) -> Tensor:
        """One tensor in the first model's order."""
        tensor = self.checkpoint.tensor(name)
        if self.transform is None:
            return tensor
        moved = self.transform(name, tensor)
        if moved.shape != tensor.shape:
            raise ValueError(f"transform_b made {tuple(moved.shape)} of {name!r} {tuple(tensor.shape)}")
        return moved


class TorchMerge:
    """Yields the tensors of the result, in pieces.

    Args:
        models: the models in the first one's order; the first gives what is not merged.
        plan: what happens to each tensor.
        settings: method, weights and parameters.
        overrides: tensors that replace those of the result.
        base: the base model, for methods that need one.
        statistics: per model, tensor name -> what the method asked for.
    """

    def __init__(
        self,
        models: Sequence[Aligned],
        plan: TensorPlan,
        settings: MergeSettings,
        overrides: Mapping[str, Tensor],
        base: Aligned | None = None,
        statistics: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.models, self.plan, self.settings, self.overrides = list(models), plan, settings, overrides
        self.base, self.statistics = base, statistics
        self.taken_from_a: list[str] = []
        self.overridden = tuple(overrides)
        self._merged, self._compared = set(plan.merged), set(plan.compared)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The merged tensor, flat, in pieces of at most `CHUNK` elements where the method allows."""
        first = self.models[0].checkpoint
        out = torch_dtype(self.plan.dtypes.get(name, first.table[name].dtype))
        if name in self.overrides:
            yield self.overrides[name].to(out)
            return
        ours = self.models[0].tensor(name)
        if name in self._merged:
            yield from self._merge(name, out)
            return
        if name in self._compared and not all(_equal(ours, other.tensor(name)) for other in self.models[1:]):
            self.taken_from_a.append(name)
        yield ours

    def _merge(self, name: str, out: torch.dtype) -> Iterator[Tensor]:
        tensors = [model.tensor(name) for model in self.models]
        base = self.base.tensor(name) if self.base is not None and self.settings.method.base else None
        statistics = None if self.statistics is None else [found.get(name) for found in self.statistics]
        looked_at = [] if self.settings.method.shows else [*tensors, *([] if base is None else [base])]
        if not all(map(is_finite, looked_at)):
            raise MergeidError(self._why(name, tensors, base, out))
        finite = True
        for piece in combine(self.settings, name, tensors, base, statistics):
            result = piece.reshape(-1).to(out)
            finite = finite and is_finite(result)
            yield result
        if not finite:  # nothing is published then
            raise MergeidError(self._why(name, tensors, base, out))

    def _why(self, name: str, group: Sequence[Tensor], origin: Tensor | None, out: torch.dtype) -> str:
        sources = [model.checkpoint for model in self.models]
        if self.base is not None and origin is not None:
            group, sources = [*group, origin], [*sources, self.base.checkpoint]
        return why_not_finite(name, zip(group, sources, strict=True), out, self.settings)


def _beside(statistic: Any, tensor: Tensor) -> Any:
    """What was measured of a model, where its tensor lies."""
    if isinstance(statistic, Gram):
        return statistic._replace(matrix=statistic.matrix.to(tensor.device))
    return statistic.to(tensor.device)


def whole(pieces: Iterable[Tensor], like: Tensor) -> Tensor:
    """The pieces of a merged tensor as one, in the shape and dtype and on the device of the first model's."""
    return torch.cat([piece.reshape(-1) for piece in pieces]).reshape(like.shape).to(like)


def combine(
    settings: MergeSettings,
    name: str,
    tensors: Sequence[Tensor],
    base: Tensor | None = None,
    statistics: Sequence[Any] | None = None,
) -> Iterator[Tensor]:
    """One merged tensor in pieces, in row-major order.

    Args:
        settings: method, weights and parameters.
        name: the tensor's name.
        tensors: one per model, of equal shape.
        base: the base model's.
        statistics: one per model; any None among them means that there are none for this tensor.
    """
    if tensors[0].is_complex():
        yield from _complex(settings, name, tensors, base)
        return
    if name in settings.added:
        for place in places(tensors[0].numel()):
            yield torch.stack([t.reshape(-1)[place] for t in tensors]).sum(0)
        return
    method, weights, needs = settings.method, settings.weights_of(name), settings.keywords(name)
    if method.seeded:
        needs["generator"] = settings.generator(name)
    known = statistics is not None and all(s is not None for s in statistics)
    if method.seeded or method.statistics:  # numbers are drawn on the CPU, the same for every device
        tensors, base = [t.cpu() for t in tensors], None if base is None else base.cpu()
    if known and statistics is not None:
        statistics = [_beside(s, tensors[0]) for s in statistics]
    if not method.elementwise:
        if method.base:
            needs["base"] = base
        if method.statistics:
            needs["statistics"] = statistics if known else None
        formed = method.formed(tensors, weights, **needs)
        if isinstance(formed, Pieces):
            yield from formed
            if not tensors[0].numel():
                yield torch.empty(0, dtype=formed.dtype)
        else:
            yield from formed.reshape(-1).split(CHUNK)
        return
    flat = [t.reshape(-1) for t in tensors]
    origin = None if base is None else base.reshape(-1)
    told = [s.reshape(-1) for s in statistics] if known and statistics else None
    for place in places(len(flat[0])) if len(flat[0]) else (slice(0, 0),):
        if method.base:
            needs["base"] = None if origin is None else origin[place]
        if method.statistics:
            needs["statistics"] = [s[place] for s in told] if told else None
        yield pieced(method.formed([t[place] for t in flat], weights, **needs))


def _complex(settings: MergeSettings, name: str, tensors: Sequence[Tensor], base: Tensor | None) -> Iterator[Tensor]:
    """Complex numbers as pairs of real ones, which every method takes; nothing is measured of them."""
    kind = reduce(torch.promote_types, [t.dtype for t in tensors])
    real = [torch.view_as_real(t.to(kind).resolve_conj()) for t in tensors]
    origin = None if base is None else torch.view_as_real(base.to(kind).resolve_conj())
    merged = torch.cat([piece.reshape(-1) for piece in combine(settings, name, real, origin)])
    yield from torch.view_as_complex(merged.reshape(-1, 2).contiguous()).split(CHUNK)


def check_finite(checkpoint: TensorSource, names: Iterable[str]) -> None:
    """To be called before models are built and compared: a merge without a plan checks while it writes.

    Args:
        checkpoint: whose tensors to read, one at a time.
        names: those that will be merged; integers among them pass.

    Raises:
        MergeidError: one of them holds NaN or an infinite number.
    """
    for name in names:
        tensor = checkpoint.tensor(name)
        if holds_numbers(tensor) and not is_finite(tensor):
            raise MergeidError(not_finite(name, checkpoint, nan=bool(torch.isnan(tensor).any())))
        checkpoint.release(name)


def why_not_finite(
    name: str, inputs: Iterable[tuple[Tensor, TensorSource]], out: torch.dtype, settings: MergeSettings
) -> str:
    """The sentence for a merged tensor that holds NaN or an infinite number: an input does, or `out` is too narrow."""
    for tensor, checkpoint in inputs:
        if not is_finite(tensor):
            return not_finite(name, checkpoint, nan=bool(torch.isnan(tensor).any()))
    return overflows(name, dtype_name(out), settings.weights_of(name))


_BITS = {2: (torch.int16, 0x7FFF), 4: (torch.int32, 0x7FFFFFFF), 8: (torch.int64, 0x7FFFFFFFFFFFFFFF)}


def is_finite(tensor: Tensor) -> bool:
    """No NaN, no infinity. Both have the largest exponent, so that the bits without their sign tell, read as whole
    numbers, faster than the numbers do."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.numel() == 0 or tensor.itemsize not in _BITS or tensor.device.type != "cpu":
        return bool(torch.isfinite(tensor.float()).all())
    kind, unsigned = _BITS[tensor.itemsize]
    infinity = int(torch.tensor([math.inf], dtype=tensor.dtype).view(kind))
    return all(
        int(np.bitwise_and(part.view(kind).numpy(), unsigned).max()) < infinity
        for part in tensor.contiguous().reshape(-1).split(CHUNK)
    )


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(ours, theirs) if ours.dtype == theirs.dtype else bool((ours == theirs).all())
