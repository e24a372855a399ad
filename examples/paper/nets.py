"""The networks: an MLP with LayerNorm and GELU, a small ResNet, and their asymmetric variants."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergeid import nn as mnn

FIXED_SEED = 1234
"""Of the fixed parts: all networks of a variant share them."""


class Mlp(nn.Module):
    """`depth` times Linear, LayerNorm, GELU; then the head."""

    def __init__(self, inputs: int, width: int = 512, depth: int = 4, classes: int = 10) -> None:
        super().__init__()
        sizes = [inputs, *[width] * depth]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.LayerNorm(b), nn.GELU())
            for a, b in zip(sizes[:-1], sizes[1:], strict=True)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act = nn.ReLU()
        plain = stride == 1 and inputs == outputs
        self.down = (
            None if plain else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return self.act(y + (x if self.down is None else self.down(x)))


class ResNet(nn.Module):
    """A stem of stride 2 and three residual blocks of growing width."""

    def __init__(self, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 5, 2, 2, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2))
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@dataclass(frozen=True)
class Variant:
    """How a network is made asymmetric: kind None is the standard network."""

    name: str
    kind: str | None = None
    sigma: float = 0.0


VARIANTS = {
    v.name: v
    for v in (
        Variant("standard"),
        *(Variant(f"W {sigma:g}", "w", sigma) for sigma in (0.0, 0.5, 1.0, 2.0)),
        *(Variant(f"SYRE {sigma:g}", "syre", sigma) for sigma in (0.1, 1.0)),
    )
}


def make(net: str, inputs: int, width: int, variant: Variant, seed: int) -> nn.Module:
    """A fresh network: `seed` draws the trainable weights, a seed common to all the fixed parts."""
    torch.manual_seed(seed)
    model = Mlp(inputs, width) if net == "mlp" else ResNet(width)
    if variant.kind is not None:
        generator = torch.Generator().manual_seed(FIXED_SEED)
        mnn.asymmetrise(model, variant.kind, sigma=variant.sigma, fixed=0.25, generator=generator)
    return model


def plain(net: str, inputs: int, width: int) -> nn.Module:
    """The ordinary architecture, for folded weights."""
    return (Mlp(inputs, width) if net == "mlp" else ResNet(width)).eval()


def hidden(model: nn.Module) -> list[str]:
    """Modules whose outputs are the hidden layers, by depth."""
    kind = nn.GELU if isinstance(model, Mlp) else Block
    return [n for n, m in model.named_modules() if isinstance(m, kind)]
