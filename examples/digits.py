"""Small networks on scikit-learn's 8 × 8 digits whose weights have a fixed part: W_eff = F + D ⊙ W.

Shared by the examples; run nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

KINDS = ("noise", "scaled", "mask", "base")
"""F random and D = 1; F random and D random in [0.8, 1]; F random on half of the entries and D the other half; F the
weights of a network trained before and D = 1."""


def images() -> tuple[np.ndarray, np.ndarray]:
    """float32 [1797, 8, 8] in [0, 1] and labels."""
    found = load_digits()
    return (found.images / 16).astype(np.float32), found.target.astype(np.int64)


def network(widths: Sequence[int] = (64, 32, 32, 10)) -> nn.Sequential:
    """Fully connected, ReLU between the layers, whose names are 0, 2, 4, …"""
    layers: list[nn.Module] = []
    for a, b in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def fixed_parts(kind: str, model: nn.Sequential, sigma: float, seed: int) -> dict[str, tuple[Tensor, Tensor | None]]:
    """(F, D) of every weight; for "base", the model's own weights."""
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        if kind == "base":
            out[name] = (weight.detach().clone(), None)
            continue
        noise = sigma * torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5
        draw = torch.rand(weight.shape, generator=generator)
        if kind == "mask":
            mask = (draw < 0.5).float()
            out[name] = ((1 - mask) * noise, mask)
        else:
            out[name] = (noise, 0.8 + 0.2 * draw if kind == "scaled" else None)
    return out


def train(
    kind: str, *, sigma: float = 4.0, epochs: int = 20, seed: int = 0
) -> tuple[nn.Sequential, dict[str, tuple[Tensor, Tensor | None]], dict[str, Tensor]]:
    """(the network with its effective weights, its fixed parts, its trainable weights W).

    Args:
        kind: of `KINDS`. sigma: standard deviation of F, in units of 1/√inputs.
    """
    x, y = (torch.from_numpy(a) for a in images())
    x = x.flatten(1)
    torch.manual_seed(seed)
    model = network()
    if kind == "base":
        descend(model, {}, x, y, epochs, 3e-3, seed)
    parts = fixed_parts(kind, model, sigma, seed)
    trained = descend(model, parts, x, y, epochs, 1e-4 if kind == "base" else 3e-3, seed + 1)
    return model, parts, trained


def descend(
    model: nn.Sequential,
    parts: dict[str, tuple[Tensor, Tensor | None]],
    x: Tensor,
    y: Tensor,
    epochs: int,
    rate: float,
    seed: int,
) -> dict[str, Tensor]:
    """AdamW with weight decay on the trainable part; leaves the effective weights in the model."""
    # the trainable part starts at 0, or at random where the mask leaves nothing else to start from
    state = {n: torch.zeros_like(p) if n in parts else p.detach().clone() for n, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    for name in parts:
        if parts[name][1] is not None:
            state[name] = torch.randn(state[name].shape, generator=generator) / state[name].shape[1] ** 0.5
    values = {name: v.requires_grad_() for name, v in state.items()}

    def effective() -> dict[str, Tensor]:
        return {
            name: v if name not in parts else parts[name][0] + (v if parts[name][1] is None else parts[name][1] * v)
            for name, v in values.items()
        }

    optimiser = torch.optim.AdamW(values.values(), rate, weight_decay=1e-2)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            loss = F.cross_entropy(torch.func.functional_call(model, effective(), (x[batch],)), y[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        for name, value in effective().items():
            model.get_parameter(name).copy_(value)
    return {name: v.detach() for name, v in values.items() if name in parts}
