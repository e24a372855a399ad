"""The architecture families, small enough to be trained in seconds. Widths and depths are arguments."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tabular
import torch
from tasks import Shape
from torch import Tensor, nn

from mergeid import nn as mnn

sys.path.append(str(Path(__file__).parents[1] / "paper"))
from nets import Block

FIXED_SEED = 1234
"""Of the fixed parts of asymmetric networks: all networks of a group share them."""


@dataclass(frozen=True)
class Family:
    """How a family is built and trained.

    Attributes:
        make: (width, depth, shape of the data) -> a fresh network.
        repair: "bn" (statistics estimated again), "repair" (REPAIR of its linear and convolutional layers), or "" for
            networks that normalise every example by LayerNorm or RMSNorm and have nothing to repair.
        optimizer: "sgd" (momentum 0.9) or "adamw".
        rate: learning rate that trains it well; the grid multiplies it.
    """

    make: Callable[[int, int, Shape], nn.Module]
    repair: str
    optimizer: str
    rate: float


class Mlp(nn.Module):
    """`depth` times Linear and ReLU; then the head."""

    def __init__(self, width: int, depth: int, shape: Shape) -> None:
        super().__init__()
        sizes = [shape.side**2, *[width] * depth]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        self.head = nn.Linear(width, shape.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


class ResNet(nn.Module):
    """A stem of stride 2, `depth` residual blocks, the last of twice the width and stride 2."""

    def __init__(self, width: int, depth: int, shape: Shape) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        blocks = [Block(width, width, 1) for _ in range(depth - 1)]
        self.blocks = nn.Sequential(*blocks, Block(width, 2 * width, 2))
        self.head = nn.Linear(2 * width, shape.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Vgg(nn.Module):
    """`depth` convolutions, the first two followed by pooling, and a hidden linear layer; with or without BatchNorm."""

    def __init__(self, width: int, depth: int, shape: Shape, norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 1
        for i in range(depth):
            outputs = width if i == 0 else 2 * width
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=not norm))
            layers += [nn.BatchNorm2d(outputs)] if norm else []
            layers += [nn.ReLU(), nn.MaxPool2d(2)] if i < 2 else [nn.ReLU()]
            inputs = outputs
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Linear(inputs * (shape.side // 4) ** 2, 4 * width)
        self.head = nn.Linear(4 * width, shape.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.features(x).flatten(1)).relu())


def _patch(shape: Shape) -> int:
    return 3 if shape.side == 12 else 2


def _convnext(width: int, depth: int, shape: Shape) -> nn.Module:
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(
        in_chans=1,
        num_classes=shape.classes,
        depths=(depth, 1, 1, 1),
        dims=(width, 2 * width, 2 * width, 2 * width),
        kernel_sizes=3,
        patch_size=1,
        output_stride=8,
        ls_init_value=0.5,
    )


def _vit(width: int, depth: int, shape: Shape) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=shape.side,
        patch_size=_patch(shape),
        in_chans=1,
        num_classes=shape.classes,
        global_pool="avg",
        class_token=False,
        embed_dim=width,
        depth=depth,
        num_heads=4,
        mlp_ratio=2,
    )


def _mixer(width: int, depth: int, shape: Shape) -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(
        num_classes=shape.classes,
        img_size=shape.side,
        in_chans=1,
        patch_size=_patch(shape),
        num_blocks=depth,
        embed_dim=width,
        mlp_ratio=(1.0, 2.0),
    )


def _bert(width: int, depth: int, shape: Shape) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=shape.tokens,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=shape.classes,
    )
    return BertForSequenceClassification(config)


def _gpt(width: int, depth: int, shape: Shape) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.tokens,
        n_positions=16,
        n_embd=width,
        n_layer=depth,
        n_head=4,
        n_inner=2 * width,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def _llama(width: int, depth: int, shape: Shape) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.tokens,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


FAMILIES = {
    "mlp": Family(Mlp, "repair", "sgd", 0.05),
    "resnet-narrow": Family(ResNet, "bn", "sgd", 0.1),
    "resnet-wide": Family(ResNet, "bn", "sgd", 0.1),
    "vgg": Family(lambda w, d, s: Vgg(w, d, s, norm=False), "repair", "sgd", 0.05),
    "vgg-bn": Family(lambda w, d, s: Vgg(w, d, s, norm=True), "bn", "sgd", 0.1),
    "tabular": Family(lambda w, d, s: tabular.network(s.columns, w, d, s.classes), "bn", "adamw", 3e-3),
    "convnext": Family(_convnext, "", "adamw", 3e-3),
    "vit": Family(_vit, "", "adamw", 3e-3),
    "mixer": Family(_mixer, "", "adamw", 3e-3),
    "bert": Family(_bert, "", "adamw", 3e-3),
    "gpt": Family(_gpt, "", "adamw", 3e-3),
    "llama": Family(_llama, "", "adamw", 3e-3),
}


def make(family: str, width: int, depth: int, shape: Shape, seed: int, sigma: float | None = None) -> nn.Module:
    """A fresh network in eval mode: `seed` draws the trainable weights. With `sigma` it is W-asymmetric, with fixed
    values of that standard deviation, which a seed common to all draws."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = FAMILIES[family].make(width, depth, shape)
    if sigma is not None:
        generator = torch.Generator().manual_seed(FIXED_SEED)
        mnn.asymmetrise(model, "w", sigma=sigma, fixed=0.25, generator=generator)
    return model.eval()
