"""The paper's bound on the chord deviation, and what it presumes.

For two networks W = F + (W - F) that share a fixed part F, the deviation of a ReLU layer from its chord is
O(β^{3/2}) ‖F Σ^{1/2}‖_F in the root mean square (arXiv:2606.04754): β, the trainable over the fixed part of the
pre-activations, is the share of them that may change sign, and they change by β. It is asymptotic in β, has an unknown
constant (taken as 1 here), presumes matched inputs and is no certificate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergeid.basics.on_demand import in_pieces
from mergeid.basics.squares import sum_of_squares
from mergeid.prediction.lockstep import Forward, Operation, visit

LARGE = 0.5
"""β above which β^{3/2} says nothing: the trainable part decides the signs."""


@dataclass(frozen=True)
class LayerBound:
    """Attributes:
    beta: root mean square of the trainable over the fixed part of the pre-activations, mean of both networks.
    bound: β^{3/2}, relative to the fixed part's root mean square.
    """

    layer: str
    beta: float
    bound: float


@dataclass(frozen=True)
class Bound:
    """Attributes:
    layers: those whose fixed part is not 0.
    statement: whether its assumptions hold, in words.
    """

    layers: list[LayerBound]
    statement: str

    @property
    def holds(self) -> bool:
        return bool(self.layers) and max(x.beta for x in self.layers) <= LARGE

    def to_json(self) -> dict[str, Any]:
        return {
            "holds": self.holds,
            "statement": self.statement,
            "layers": [x.__dict__ for x in self.layers],
        }


def no_bound() -> Bound:
    return Bound(
        [],
        "the bound of arXiv 2606.04754 does not apply: the models have no known fixed part in common (no --base, no "
        "asymmetric layers)",
    )


@torch.no_grad()
def chord_bound(a: nn.Module, b: nn.Module, fixed: nn.Module, forward: Forward, batch: Any) -> Bound:
    """The bound of every layer with a matrix.

    Args:
        a, b: in one order of neurons. fixed: the same network with F for weights.
        batch: inputs; every layer is judged on what A and B themselves feed it."""
    still: dict[int, Operation] = {}

    def keep(index: int, op: Operation) -> None:
        matrix = op.matrix()
        if matrix is not None and any(bool(p.any()) for (p,) in in_pieces(matrix)):
            for i in op.active:  # only its weights are needed
                op.leaves[i] = None
            op.out = op.out.new_empty(0)
            still[index] = op

    visit(fixed, forward, batch, keep)
    ratios: dict[int, list[float]] = {k: [] for k in still}

    def compare(index: int, op: Operation) -> None:
        if index in still and op.out.is_floating_point():
            own = still[index].at([op.leaves[i] for i in op.active], False)
            below = _rms(own - own.mean(0))
            ratios[index].append(_rms(op.out - own) / below if below > 0 else float("inf"))

    for net in (a, b):
        visit(net, forward, batch, compare)
    found = []
    for index, both in ratios.items():
        names = still[index].weights
        name = next((w for w in names if w.endswith("weight")), names[0])
        beta = sum(both) / 2
        found += [LayerBound(name, beta, beta**1.5)] if both else []
    if not found:
        return no_bound()
    worst = max(found, key=lambda x: x.beta)
    if worst.beta <= LARGE:
        said = (
            f"the bound of arXiv 2606.04754 holds asymptotically: β ≤ {worst.beta:.3g}, so no layer leaves its chord "
            f"by more than about β^1.5 = {worst.bound:.2g} of its fixed part (not a certificate)"
        )
    else:
        said = (
            f"the bound of arXiv 2606.04754 does not hold: β = {worst.beta:.2g} at {worst.layer}, and "
            f"the bound is for β far below 1 (taken as ≤ {LARGE})"
        )
    return Bound(found, said)


def _rms(x: Tensor) -> float:
    return math.sqrt(sum_of_squares(x) / max(x.numel(), 1))
