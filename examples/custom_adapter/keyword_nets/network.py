"""A residual network of gated dilated convolutions over time. It knows nothing of mergeid."""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

BANDS = 40


class GatedBlock(nn.Module):
    """x + project(tanh(a) * sigmoid(b)), a and b from one convolution."""

    def __init__(self, channels: int, hidden: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        self.gated = nn.Conv1d(channels, 2 * hidden, 3, dilation=dilation, padding=dilation)
        self.project = nn.Conv1d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.gated(self.norm(x)).chunk(2, dim=1)
        return x + self.project(a.tanh() * b.sigmoid())


class KeywordNet(nn.Module):
    """Spectrograms [batch, 40 bands, time] -> logits [batch, words]."""

    def __init__(self, channels: int = 16, hidden: int = 24, depth: int = 3, words: int = 10) -> None:
        super().__init__()
        self.front = nn.Conv1d(BANDS, channels, 3, padding=1)
        self.blocks = nn.ModuleList(GatedBlock(channels, hidden, 2**i) for i in range(depth))
        self.head = nn.Linear(channels, words)

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.relu().mean(2))


def save(path: str, seed: int) -> None:
    """Write a network with random weights."""
    torch.manual_seed(seed)
    save_file(KeywordNet().state_dict(), path)
