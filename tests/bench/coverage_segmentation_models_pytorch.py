"""segmentation_models_pytorch for the coverage table: every architecture over several encoders, with and without the
auxiliary classifier, random weights."""

from __future__ import annotations

from typing import Any

import torch
from coverage_live import Live

ENCODERS = ("resnet18", "mobilenet_v2", "efficientnet-b0", "densenet121", "mit_b0", "timm-regnetx_002", "vgg11_bn")
ARCHITECTURES = {
    "Unet": ENCODERS,
    "UnetPlusPlus": tuple(e for e in ENCODERS if e != "mit_b0"),
    "MAnet": ENCODERS,
    "Linknet": tuple(e for e in ENCODERS if e != "mit_b0"),
    "FPN": ENCODERS,
    "PSPNet": ENCODERS,
    "PAN": ("resnet18", "mobilenet_v2", "efficientnet-b0", "timm-regnetx_002"),
    "DeepLabV3": ("resnet18", "mobilenet_v2", "efficientnet-b0", "timm-regnetx_002"),
    "DeepLabV3Plus": ("resnet18", "mobilenet_v2", "efficientnet-b0", "timm-regnetx_002"),
    "Segformer": ENCODERS,
    "UPerNet": ENCODERS,
    "DPT": ("tu-vit_tiny_patch16_224",),
}
MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Unet/resnet18+classifier": ("Unet", "resnet18", {"aux_params": {"classes": 4, "dropout": 0.1}}),
    "FPN/resnet18+classifier": ("FPN", "resnet18", {"aux_params": {"classes": 4}}),
    "Unet/resnet18+scse": ("Unet", "resnet18", {"decoder_attention_type": "scse"}),
    "Unet/resnext50_32x4d": ("Unet", "resnext50_32x4d", {}),
    "Unet/timm-efficientnet-lite0": ("Unet", "timm-efficientnet-lite0", {}),
    "Unet/tu-convnext_atto": ("Unet", "tu-convnext_atto", {"encoder_depth": 4, "decoder_channels": (64, 32, 16, 8)}),
    "Unet/tu-mobilenetv3_small_100": ("Unet", "tu-mobilenetv3_small_100", {}),
    "Unet/tu-swin_tiny_patch4_window7_224": (
        *("Unet", "tu-swin_tiny_patch4_window7_224"),
        {"encoder_depth": 4, "decoder_channels": (64, 32, 16, 8), "img_size": 64},
    ),
    "Unet/xception": ("Unet", "xception", {}),
    "Unet/inceptionv4": ("Unet", "inceptionv4", {}),
    "Unet/dpn68": ("Unet", "dpn68", {}),
    "Unet/se_resnet50": ("Unet", "se_resnet50", {}),
    "Unet/mobileone_s0": ("Unet", "mobileone_s0", {}),
    "FPN/timm-skresnet18": ("FPN", "timm-skresnet18", {}),
    "DPT/tu-vit_tiny_patch16_224+classifier": ("DPT", "tu-vit_tiny_patch16_224", {"aux_params": {"classes": 4}}),
}


def _models() -> dict[str, tuple[str, str, dict[str, Any]]]:
    pairs = [(a, e) for a, encoders in ARCHITECTURES.items() for e in encoders]
    plain = {f"{a}/{e}": (a, e, {}) for a, e in sorted(pairs, key=lambda p: ARCHITECTURES[p[0]].index(p[1]))}
    return {**plain, **MORE}


def names() -> list[str]:
    import segmentation_models_pytorch  # noqa: F401  # before the bench forks

    return list(_models())


def families() -> dict[str, str]:
    return {name: model[0] for name, model in _models().items()}


def make(name: str) -> Live:
    import segmentation_models_pytorch as smp

    architecture, encoder, options = _models()[name]
    torch.manual_seed(0)
    size = {"DPT": 224, "PAN": 128}.get(architecture, 64)
    build = getattr(smp, architecture)
    model = build(encoder_name=encoder, encoder_weights=None, in_channels=3, classes=3, **options)
    return Live(model, lambda g, n: {"x": torch.randn(n, 3, size, size, generator=g)}, f"images of {size}")
