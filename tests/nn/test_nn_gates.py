"""The gate of a σ-asymmetric activation mixes channels, wherever they lie."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mergeid import nn as mnn


class After(nn.Module):
    """An activation after a layer."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.act, self.width = layer, nn.ReLU(), width

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        out: Tensor = self.act(y[0] if isinstance(y, tuple) else y)
        return out


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "conv1d": (lambda: nn.Conv1d(3, 5, 1), (2, 3, 4), 1),
    "conv1d of one example": (lambda: nn.Conv1d(3, 5, 1), (3, 4), 0),
    "conv2d": (lambda: nn.Conv2d(3, 5, 1), (2, 3, 4, 6), 1),
    "conv2d of one example": (lambda: nn.Conv2d(3, 5, 1), (3, 4, 6), 0),
    "conv3d": (lambda: nn.Conv3d(3, 5, 1), (2, 3, 4, 6, 7), 1),
    "conv3d of one example": (lambda: nn.Conv3d(3, 5, 1), (3, 4, 6, 7), 0),
    "transposed": (lambda: nn.ConvTranspose2d(3, 5, 2), (2, 3, 4, 6), 1),
    "flattened over space": (lambda: nn.Sequential(nn.Conv2d(3, 5, 1), nn.Flatten(2)), (2, 3, 4, 6), 1),
    "linear": (lambda: nn.Linear(3, 5), (2, 4, 3), 2),
    "linear in four axes": (lambda: nn.Linear(3, 5), (2, 4, 6, 3), 3),
    "recurrent": (lambda: nn.GRU(3, 5), (4, 2, 3), 2),
    "recurrent after a convolution": (lambda: nn.Sequential(nn.Conv1d(3, 6, 1), nn.GRU(4, 5)), (2, 3, 4), 2),
}
"""A layer of 5 neurons, the shape of its input, and the axis on which its neurons lie."""


@pytest.mark.parametrize("name", LAYERS)
def test_the_gate_mixes_channels(name: str) -> None:
    layer, shape, axis = LAYERS[name]
    torch.manual_seed(0)
    model, x = After(layer(), 5), torch.randn(shape)
    before = model(x).movedim(axis, -1)
    y = model.layer(x)
    y = (y[0] if isinstance(y, tuple) else y).movedim(axis, -1)
    done = mnn.asymmetrise(model, "sigma", generator=torch.Generator().manual_seed(0), example_inputs=x)
    assert done.converted == ["act"]
    (gate,) = (b for n, b in model.named_buffers() if n.startswith("act"))
    expected = 2 * torch.sigmoid(torch.einsum("...i,oi->...o", y, gate.reshape(5, 5))) * before
    torch.testing.assert_close(model(x).movedim(axis, -1), expected)
