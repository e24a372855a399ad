"""How far outputs are apart, in shares of their size."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

import torch
from torch import Tensor

MASKED = 1e30
"""Numbers beyond this are masks (infinity, or the lowest number of a shorter float), not results."""
BESIDE = 10
"""How much larger than all that depends on the weights something else in an output must be to be no measure of it."""


def relative_error(reference: list[Tensor], other: list[Tensor]) -> float:
    """max |a − b| / max |a| over the outputs, without what is masked (or no number) in both; infinite where only one
    is."""
    return max((_apart(a, b, None) for a, b in zip(reference, other, strict=True)), default=0.0)


def errors(
    reference: Mapping[str, Tensor], other: Mapping[str, Tensor], measures: Mapping[str, Tensor]
) -> dict[str, float]:
    """The relative error of every output by its name, infinite where it is missing.

    Args:
        measures: name -> the entries that the error is a share of (`measures`); all of them where it has none.
    """
    return {n: _apart(a, other[n], measures.get(n)) if n in other else inf for n, a in reference.items()}


def measures(reference: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the outputs in which the largest numbers depend on no weight (logits of what is forbidden, −1e9) the entries
    that do: all are compared, but an error is a share of these.

    Args:
        changed: the same outputs with weights that differ.
    """
    found = {}
    for name, a in reference.items():
        depends = (a != changed[name]) & _counts(a) if name in changed and changed[name].shape == a.shape else None
        if depends is not None and bool(depends.any()) and BESIDE * _size(a, depends) < _size(a, _counts(a)):
            found[name] = depends
    return found


def any_nan(outputs: Mapping[str, Tensor]) -> bool:
    """Infinities are masked logits; a single number beside other outputs may be a mean over nothing."""
    return any(bool(t.isnan().any()) for t in outputs.values() if t.numel() > 1 or len(outputs) == 1)


def as_real(tensor: Tensor) -> Tensor:
    """In float64, a complex number as two real ones."""
    return torch.view_as_real(tensor).double() if tensor.is_complex() else tensor.double()


def _counts(tensor: Tensor) -> Tensor:
    return tensor.abs() < MASKED


def _size(tensor: Tensor, where: Tensor) -> float:
    return float(tensor[where].abs().max().item())


def _apart(a: Tensor, b: Tensor, measure: Tensor | None) -> float:
    counts = _counts(a)
    if not torch.equal(counts, _counts(b)):
        return inf
    if not bool(counts.any()):  # also: empty
        return 0.0
    scale = _size(a, counts if measure is None else measure)
    apart = (a - b)[counts].abs().max().item()
    value = apart / scale if scale > 0 else apart
    return value if value == value else inf
