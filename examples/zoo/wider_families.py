"""Families that the first zoo lacks: recurrent text classifiers, networks with GroupNorm and standardised weights,
MambaOut- and NFNet-types; dense concatenation, inverted residuals, text classifiers by convolution, gated MLPs; grouped
convolutions, pooling instead of attention, bags of words, temporal convolutions, tanh. Small, as `families.py` has
them."""

from __future__ import annotations

import torch
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


class Dense(nn.Module):
    """A stem of stride 2, `depth` layers that each add half the width to all that layers before gave (DenseNet)."""

    def __init__(self, width: int, depth: int, shape: Shape) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 2, 1, bias=False)
        sizes = [width + k * (width // 2) for k in range(depth + 1)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in sizes)
        self.convs = nn.ModuleList(nn.Conv2d(n, width // 2, 3, 1, 1, bias=False) for n in sizes[:-1])
        self.head = nn.Linear(sizes[-1], shape.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms[:-1], self.convs, strict=True):
            x = torch.cat([x, conv(norm(x).relu())], 1)
        return self.head(self.norms[-1](x).relu().mean((2, 3)))


class Inverted(nn.Module):
    """Expand twice, filter every channel by itself, weigh the channels by what they hold, project."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = 2 * inputs
        self.expand = nn.Sequential(nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.Hardswish())
        self.each = nn.Sequential(
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.Hardswish()
        )
        self.squeeze = nn.Sequential(nn.Conv2d(inner, 8, 1), nn.ReLU(), nn.Conv2d(8, inner, 1), nn.Hardsigmoid())
        self.project = nn.Sequential(nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.same = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.each(self.expand(x))
        y = self.project(y * self.squeeze(y.mean((2, 3), keepdim=True)))
        return x + y if self.same else y


class Mobile(nn.Module):
    """A stem of stride 2, `depth` inverted residuals, the last of twice the width and stride 2, as MobileNets have."""

    def __init__(self, width: int, depth: int, shape: Shape) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.Hardswish())
        blocks = [Inverted(width, width, 1) for _ in range(depth - 1)]
        self.blocks = nn.Sequential(*blocks, Inverted(width, 2 * width, 2))
        self.head = nn.Linear(2 * width, shape.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class TextCnn(nn.Module):
    """Embedding, convolutions of several lengths side by side, the largest value over the positions, hidden layers."""

    def __init__(self, width: int, depth: int, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.tokens, width)
        self.convs = nn.ModuleList(nn.Conv1d(width, width, n, padding=1) for n in (2, 3))
        self.hidden = nn.ModuleList(nn.Linear(2 * width, 2 * width) for _ in range(depth - 1))
        self.head = nn.Linear(2 * width, shape.classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embedding(x).transpose(1, 2)
        y = torch.cat([conv(y).relu().amax(2) for conv in self.convs], 1)
        for layer in self.hidden:
            y = layer(y).relu()
        return self.head(y)


class GatedBlock(nn.Module):
    """One half of the hidden channels, mixed over the positions, is the other's gate."""

    def __init__(self, width: int, positions: int) -> None:
        super().__init__()
        self.norm, self.inside = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.over = nn.Linear(positions, positions)
        nn.init.zeros_(self.over.weight)
        nn.init.ones_(self.over.bias)

    def forward(self, x: Tensor) -> Tensor:
        u, v = nn.functional.gelu(self.up(self.norm(x))).chunk(2, -1)
        return x + self.down(u * self.over(self.inside(v).transpose(1, 2)).transpose(1, 2))


class Gated(nn.Module):
    """Patches of 2 pixels, `depth` blocks of a gMLP, the mean over the positions."""

    def __init__(self, width: int, depth: int, shape: Shape) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.blocks = nn.Sequential(*(GatedBlock(width, (shape.side // 2) ** 2) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, shape.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patch(x).flatten(2).transpose(1, 2))).mean(1))


class Bottleneck(nn.Module):
    """Narrow, filter in groups of channels, widen, add."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.narrow = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
        self.groups = nn.Sequential(
            nn.Conv2d(outputs, outputs, 3, stride, 1, groups=4, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        )
        self.widen = nn.Sequential(nn.Conv2d(outputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        same = stride == 1 and inputs == outputs
        self.down = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.widen(self.groups(self.narrow(x))) + (x if self.down is None else self.down(x))).relu()


class Grouped(nn.Module):
    """A stem of stride 2, `depth` residual bottlenecks with grouped convolutions, the last of twice the width and
    stride 2, as RegNets have."""

    def __init__(self, width: int, depth: int, shape: Shape) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        blocks = [Bottleneck(width, width, 1) for _ in range(depth - 1)]
        self.blocks = nn.Sequential(*blocks, Bottleneck(width, 2 * width, 2))
        self.head = nn.Linear(2 * width, shape.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class PoolBlock(nn.Module):
    """Positions are mixed by their neighbours' mean, channels by a hidden layer, both scaled per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, width), nn.GroupNorm(1, width)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.mlp = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.GELU(), nn.Conv2d(2 * width, width, 1))
        self.scale1 = nn.Parameter(torch.full((width, 1, 1), 0.5))
        self.scale2 = nn.Parameter(torch.full((width, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.scale1 * (self.pool(y) - y)
        return x + self.scale2 * self.mlp(self.norm2(x))


class Pool(nn.Module):
    """Patches of 2 pixels, `depth` blocks of a PoolFormer, the mean over the positions."""

    def __init__(self, width: int, depth: int, shape: Shape) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 3, 2, 1)
        self.blocks = nn.Sequential(*(PoolBlock(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, shape.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patch(x)).mean((2, 3))))


class Bag(nn.Module):
    """The mean of the embeddings, `depth` residual hidden layers, the head."""

    def __init__(self, width: int, depth: int, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(shape.tokens, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))
        self.head = nn.Linear(width, shape.classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embedding(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            y = y + down(nn.functional.silu(up(norm(y))))
        return self.head(y)


class Temporal(nn.Module):
    """Embedding, `depth` residual convolutions over the positions with BatchNorm, the mean, the head."""

    def __init__(self, width: int, depth: int, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.tokens, width)
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1, bias=False) for _ in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(depth))
        self.head = nn.Linear(width, shape.classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embedding(x).transpose(1, 2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = y + norm(conv(y)).relu()
        return self.head(y.mean(2))


class Tanh(nn.Module):
    """A table's columns, normalised; `depth` layers of tanh; the head."""

    def __init__(self, width: int, depth: int, shape: Shape) -> None:
        super().__init__()
        sizes = [shape.columns, *[width] * depth]
        self.norm = nn.BatchNorm1d(shape.columns)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        self.head = nn.Linear(width, shape.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


WIDER = {
    "gru": Family(lambda w, d, s: Recurrent(nn.GRU, w, d, s), "", "adamw", 3e-3),
    "lstm": Family(lambda w, d, s: Recurrent(nn.LSTM, w, d, s), "", "adamw", 3e-3),
    "groupnorm": Family(lambda w, d, s: GroupNormNet(w, d, s, standard=False), "", "sgd", 0.1),
    "standardised": Family(lambda w, d, s: GroupNormNet(w, d, s, standard=True), "", "sgd", 0.1),
    "mambaout": Family(_mambaout, "", "adamw", 3e-3),
    "nfnet": Family(_nfnet, "", "sgd", 0.05),
    "dense": Family(Dense, "bn", "sgd", 0.1),
    "mobile": Family(Mobile, "bn", "adamw", 3e-3),
    "textcnn": Family(TextCnn, "repair", "adamw", 3e-3),
    "gated": Family(Gated, "", "adamw", 3e-3),
    "grouped": Family(Grouped, "bn", "sgd", 0.1),
    "pool": Family(Pool, "", "adamw", 3e-3),
    "bag": Family(Bag, "", "adamw", 3e-3),
    "temporal": Family(Temporal, "bn", "adamw", 3e-3),
    "tanh": Family(Tanh, "repair", "adamw", 3e-3),
}
