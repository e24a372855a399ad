"""Families that the first zoo lacks: recurrent text classifiers, networks with GroupNorm and standardised weights,
MambaOut- and NFNet-types. Small, as `families.py` has them."""

from __future__ import annotations

from families import Family
from tasks import Shape
from torch import Tensor, nn


class Recurrent(nn.Module):
    """Embedding, `depth` recurrent layers, the mean over the positions, the head."""

    def __init__(self, kind: type[nn.GRU] | type[nn.LSTM], width: int, depth: int, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.tokens, width)
        self.layers = kind(width, width, depth, batch_first=True)
        self.head = nn.Linear(width, shape.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(x))[0].mean(1))


class GroupNormBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, standard: bool) -> None:
        super().__init__()
        from timm.layers import StdConv2d

        conv = StdConv2d if standard else nn.Conv2d
        self.conv1 = conv(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(2, outputs)
        self.conv2 = conv(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(2, outputs)
        self.act = nn.ReLU()
        self.down = None if stride == 1 and inputs == outputs else conv(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        return self.act(y + (x if self.down is None else self.down(x)))


class GroupNormNet(nn.Module):
    """A stem of stride 2, `depth` residual blocks with GroupNorm, the last of twice the width and stride 2; with or
    without standardised weights."""

    def __init__(self, width: int, depth: int, shape: Shape, standard: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1), nn.GroupNorm(2, width), nn.ReLU())
        blocks = [GroupNormBlock(width, width, 1, standard) for _ in range(depth - 1)]
        self.blocks = nn.Sequential(*blocks, GroupNormBlock(width, 2 * width, 2, standard))
        self.head = nn.Linear(2 * width, shape.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def _mambaout(width: int, depth: int, shape: Shape) -> nn.Module:
    from timm.models.mambaout import MambaOut

    return MambaOut(in_chans=1, num_classes=shape.classes, depths=(depth, 1), dims=(width, 2 * width), kernel_size=3)


def _nfnet(width: int, depth: int, shape: Shape) -> nn.Module:
    from timm.models.nfnet import NfCfg, NormFreeNet

    config = NfCfg(
        depths=(depth, 1),
        channels=(2 * width, 4 * width),
        stem_type="3x3",
        stem_chs=width,
        group_size=8,
        bottle_ratio=0.5,
        num_features=4 * width,
    )
    return NormFreeNet(config, num_classes=shape.classes, in_chans=1)


WIDER = {
    "gru": Family(lambda w, d, s: Recurrent(nn.GRU, w, d, s), "", "adamw", 3e-3),
    "lstm": Family(lambda w, d, s: Recurrent(nn.LSTM, w, d, s), "", "adamw", 3e-3),
    "groupnorm": Family(lambda w, d, s: GroupNormNet(w, d, s, standard=False), "", "sgd", 0.1),
    "standardised": Family(lambda w, d, s: GroupNormNet(w, d, s, standard=True), "", "sgd", 0.1),
    "mambaout": Family(_mambaout, "", "adamw", 3e-3),
    "nfnet": Family(_nfnet, "", "sgd", 0.05),
}
