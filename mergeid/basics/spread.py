"""How much an output varies from example to example."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Spread:
    """Variance of an output about its mean over the examples: element by element where all batches have one shape,
    else by the last dimension, or of all numbers where that too has another length (scores of every pair of nodes).
    Padding and what is not finite is left out."""

    def __init__(self) -> None:
        self.shape: torch.Size | None = None
        self.same = self.aligned = True
        self.whole: list[Tensor] = []
        self.last: list[Tensor] = []
        self.square = torch.zeros(2, dtype=torch.float64)
        self.numbers = 0

    def add(self, out: Tensor, batch: Mapping[str, object]) -> None:
        """An output [examples, …] on a batch, whose attention mask, if it has one, says what is padding."""
        values = out.detach().double().cpu()
        mask = batch.get("attention_mask")
        masked = isinstance(mask, Tensor) and values.dim() > 2 and mask.shape == values.shape[:2]
        self.shape = self.shape or values.shape[1:]
        self.same = self.same and not masked and values.dim() > 1 and values.shape[1:] == self.shape
        rows = values[mask.bool().cpu()] if masked and isinstance(mask, Tensor) else values
        rows = rows.reshape(-1, rows.shape[-1]) if rows.dim() > 1 else rows.reshape(-1, 1)
        if self.aligned and self.last and rows.shape[-1] != len(self.last[0]):
            self.aligned, self.last = False, [s.sum(0, keepdim=True) for s in self.last]
        self.last = _added(self.last, rows if self.aligned else rows.reshape(-1, 1))
        if self.same:
            self.whole = _added(self.whole, values.flatten(1))
        self.numbers += rows.numel()
        finite = rows[rows.isfinite()]
        self.square += torch.tensor([finite.square().sum(), len(finite)], dtype=torch.float64)

    def variance(self, dtype: torch.dtype) -> float:
        """At least what rounding alone could make."""
        return max(self._seen(), torch.finfo(dtype).eps * self._size(), 1e-300)

    def constant(self, dtype: torch.dtype) -> bool:
        """Whether the examples do not change the output, but for the rounding of its numbers."""
        return self._seen() <= torch.finfo(dtype).eps ** 2 * self._size()

    def _seen(self) -> float:
        count, total, squares = self.whole if self.same else self.last
        mean = total / count.clamp(min=1)
        return float((squares - count * mean.square()).clamp(min=0).sum()) / max(self.numbers, 1)

    def _size(self) -> float:
        return float(self.square[0] / self.square[1].clamp(min=1))


def _added(sums: list[Tensor], rows: Tensor) -> list[Tensor]:
    """(count, sum, sum of squares) per column, with these rows."""
    finite = rows.isfinite()
    known = rows.masked_fill(~finite, 0.0)
    new = [finite.double().sum(0), known.sum(0), known.square().sum(0)]
    return [a + b for a, b in zip(sums, new, strict=True)] if sums else new
