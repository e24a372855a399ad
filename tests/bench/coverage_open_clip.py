"""open_clip for the coverage table: every kind of its model configurations, in small. Image and text features, the
scale of the logits and the captioner's logits are all outputs."""

from __future__ import annotations

from typing import Any

import torch
from coverage_live import Batch, Live

VISION = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
TEXT = {"context_length": 12, "vocab_size": 64, "width": 24, "heads": 2, "layers": 2}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "head_width": 8}
COCA_VISION = {
    **VISION,
    "attentional_pool": True,
    "attn_pooler_heads": 2,
    "attn_pooler_queries": 6,
    "output_tokens": True,
}
COCA_TEXT = {**TEXT, "embed_cls": True, "output_tokens": True, "context_length": 11}
MULTIMODAL = {"context_length": 11, "vocab_size": 64, "width": 24, "heads": 2, "layers": 2, "attn_pooler_heads": 2}
SIGLIP_TEXT = {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}


def _timm(name: str, **options: Any) -> dict[str, Any]:
    return {"timm_model_name": name, "timm_model_pretrained": False, "image_size": 64, **options}


MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "ViT": ("CLIP", VISION, TEXT, {}),
    "ViT/quickgelu": ("CLIP", VISION, TEXT, {"quick_gelu": True}),
    "ViT/layer_scale": ("CLIP", {**VISION, "ls_init_value": 0.1}, {**TEXT, "ls_init_value": 0.1}, {}),
    "ViT/attentional_pool": ("CLIP", {**VISION, "attentional_pool": True, "attn_pooler_heads": 2}, TEXT, {}),
    "ViT/average": ("CLIP", {**VISION, "pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True}, TEXT, {}),
    "ViT/sin_cos": ("CLIP", {**VISION, "pos_embed_type": "sin_cos_2d"}, TEXT, {}),
    "ViT/siglip": ("CustomTextCLIP", VISION, SIGLIP_TEXT, {"init_logit_bias": -10.0}),
    "ViT/custom_blocks": (
        "CLIP",
        {**VISION, "block_type": "custom", "scale_heads": True, "scale_fc": True},
        {**TEXT, "block_type": "custom", "qk_norm": True, "scale_attn": True, "scale_attn_inner": True},
        {},
    ),
    "ViT/text_class_token": ("CustomTextCLIP", VISION, {**TEXT, "embed_cls": True, "context_length": 12}, {}),
    "ViT/dict": ("CLIP", VISION, TEXT, {"output_dict": True}),
    "RN": ("CLIP", RESNET, TEXT, {}),
    "RN/quickgelu": ("CLIP", RESNET, TEXT, {"quick_gelu": True}),
    "CoCa": ("CoCa", COCA_VISION, COCA_TEXT, {"multimodal_cfg": MULTIMODAL}),
    "CoCa/average": ("CoCa", {**COCA_VISION, "pool_type": "avg"}, COCA_TEXT, {"multimodal_cfg": MULTIMODAL}),
    "EVA": ("CustomTextCLIP", _timm("eva02_tiny_patch14_224", image_size=224, timm_pool="token"), TEXT, {}),
    "ConvNeXt": ("CLIP", _timm("convnext_atto", timm_proj="linear"), TEXT, {}),
    "ConvNeXt/mlp": ("CLIP", _timm("convnext_atto", timm_proj="mlp"), TEXT, {}),
    "MobileCLIP": ("CustomTextCLIP", _timm("fastvit_t8", timm_pool="avg", timm_proj=None), TEXT, {}),
    "PE": (
        "CustomTextCLIP",
        _timm("vit_tiny_patch16_224", image_size=224, timm_pool="token", timm_proj="linear"),
        SIGLIP_TEXT,
        {},
    ),
    "Swin": ("CLIP", _timm("swin_tiny_patch4_window7_224", image_size=224), TEXT, {}),
    "ViTamin": ("CustomTextCLIP", _timm("vitamin_small_224", image_size=224, timm_pool="avg"), TEXT, {}),
    "relpos": ("CLIP", _timm("vit_relpos_small_patch16_224", image_size=224, timm_pool="avg"), TEXT, {}),
}
"""Name -> (class, image tower, text tower, further arguments)."""


def names() -> list[str]:
    import open_clip  # noqa: F401  # before the bench forks
    import timm  # noqa: F401

    return list(MODELS)


def families() -> dict[str, str]:
    return {name: model[0] for name, model in MODELS.items()}


def make(name: str) -> Live:
    import open_clip

    kind, vision, text, more = MODELS[name]
    torch.manual_seed(0)
    width = 768 if name == "MobileCLIP" else text["width"]  # it has no projection of its own
    model = getattr(open_clip, kind)(embed_dim=width, vision_cfg=dict(vision), text_cfg=dict(text), **more)
    with torch.no_grad():
        for parameter in model.parameters():  # the captioner leaves some as the memory was
            if not parameter.abs().max() < 1e3:
                parameter.normal_(0, 0.1)
    size = getattr(model.visual, "image_size", vision["image_size"])
    height, across = size if isinstance(size, tuple) else (size, size)
    length = text["context_length"]

    def draw(g: torch.Generator, n: int) -> Batch:
        words = torch.randint(1, 62, (n, length), generator=g)
        words[:, -2], words[:, -1] = 63, 0  # the last word has the highest number, as CLIP's tokenizer has it
        return {"image": torch.randn(n, 3, height, across, generator=g), "text": words}

    return Live(model, draw)
