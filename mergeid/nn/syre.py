"""SYRE weights (Ziyin, Xu, Chuang, "Remove Symmetries to Control Model Expressivity and Improve Optimization", 2024).

Every weight and bias θ is trained around a static random value: the loss sees θ₀ + θ with θ₀ = σ·N fixed, and weight
decay pulls the trainable θ, not the effective value, to 0: F = σ·N, D = 1. Neurons stay apart because each is drawn
towards a point of its own; without weight decay nothing would be. `decay_groups` gives the optimiser what it needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn

from mergeid.nn.effective import Asymmetric, Parts
from mergeid.nn.kinds import kind


@kind("syre", sigma=0.1, biases=True)
def syre_parts(parameter: Tensor, axis: int, *, sigma: float, fixed: float, generator: Generator) -> Parts:
    """F of SYRE weights; D = 1. `fixed` has no meaning here: every entry has a fixed and a trainable part."""
    return Parts(sigma * torch.randn(parameter.shape, generator=generator))


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups in which weight decay acts on every parameter with a fixed part, biases too, and on every other
    parameter with at least two dimensions."""
    decayed: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, Asymmetric):
            for name in module.fixed_names:
                parameter = module._parameters[name]
                assert parameter is not None
                decayed[id(parameter)] = parameter
    decayed |= {id(p): p for p in model.parameters() if p.dim() >= 2}
    groups = (
        [p for p in model.parameters() if id(p) in decayed],
        [p for p in model.parameters() if id(p) not in decayed],
    )
    return [
        {"params": params, "weight_decay": decay}
        for params, decay in zip(groups, (weight_decay, 0.0), strict=True)
        if params
    ]
