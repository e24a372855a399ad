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
MATERIAL = 1e-5
"""Share of a number by which other weights change it if it depends on them: a mask of −1e9 that is added to a logit
swallows all but the last digits of it."""


def errors(
    reference: Mapping[str, Tensor], other: Mapping[str, Tensor], measures: Mapping[str, Tensor]
) -> dict[str, float]:
    """max |a − b| / max |a| of every output by its name, without what is masked (or no number) in both; infinite where
    only one is, or where it is missing.

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
        c = changed.get(name)
        if c is None or c.shape != a.shape:
            continue
        depends = ((a - c).abs() > MATERIAL * a.abs()) & _counts(a)
        if bool(depends.any()) and BESIDE * _size(a, depends) < _size(a, _counts(a)):
            found[name] = depends
    return found


class Yardstick:
    """Errors against outputs, in shares of what in them depends on the weights."""

    def __init__(self, reference: Mapping[str, Tensor]) -> None:
        self.reference, self.measured = reference, dict[str, Tensor]()

    def learn(self, changed: Mapping[str, Tensor]) -> None:
        """See what depends on the weights, from outputs of the same inputs with others."""
        self.measured = {**measures(self.reference, changed), **self.measured}

    def error(self, outputs: Mapping[str, Tensor]) -> float:
        """The largest `errors`."""
        return max(errors(self.reference, outputs, self.measured).values(), default=0.0)


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
