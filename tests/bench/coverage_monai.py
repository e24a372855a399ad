"""MONAI's networks for the coverage table, small and mostly two-dimensional."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from coverage_live import Draw, Live, by_prefix

Model = tuple[str, dict[str, Any], Sequence[int], str]
"""(class, arguments, shape of one example, name of the input)."""
TWO: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 3}
RES: dict[str, Any] = {"spatial_dims": 2, "n_input_channels": 1, "num_classes": 3}
DIFFUSION: dict[str, Any] = {
    **{"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "num_res_blocks": 1, "channels": (8, 16)},
    **{"attention_levels": (False, True), "norm_num_groups": 4, "num_head_channels": 4},
}
MODELS: dict[str, Model] = {
    "AHNet": ("AHNet", {"layers": (1, 1, 1, 1), **TWO, "psp_block_num": 2}, (1, 64, 64), "x"),
    "AttentionUnet": ("AttentionUnet", {**TWO, "channels": (8, 16, 32), "strides": (2, 2)}, (1, 32, 32), "x"),
    "AutoEncoder": (
        *("AutoEncoder", {**TWO, "channels": (8, 16), "strides": (2, 2), "inter_channels": (8,), "num_inter_units": 1}),
        *((1, 16, 16), "x"),
    ),
    "AutoencoderKL": (
        "AutoencoderKL",
        {**TWO, "num_res_blocks": (1, 1), "channels": (8, 16), "attention_levels": (False, True), "latent_channels": 4,
         "norm_num_groups": 4},
        *((1, 16, 16), "x"),
    ),
    "BasicUNet": ("BasicUNet", {**TWO, "features": (8, 8, 16, 16, 32, 8)}, (1, 32, 32), "x"),
    "BasicUNetPlusPlus": ("BasicUNetPlusPlus", {**TWO, "features": (8, 8, 16, 16, 32, 8)}, (1, 32, 32), "x"),
    "BasicUNetPlusPlus/deep": (
        *("BasicUNetPlusPlus", {**TWO, "features": (8, 8, 16, 16, 32, 8), "deep_supervision": True}),
        *((1, 32, 32), "x"),
    ),
    "Classifier": ("Classifier", {"in_shape": (1, 16, 16), "classes": 3, "channels": (8, 16), "strides": (2, 2)},
                   (1, 16, 16), "x"),
    "Critic": ("Critic", {"in_shape": (1, 16, 16), "channels": (8, 16), "strides": (2, 2)}, (1, 16, 16), "x"),
    "DenseNet": ("DenseNet", {**TWO, "init_features": 8, "growth_rate": 4, "block_config": (2, 2), "bn_size": 2},
                 (1, 32, 32), "x"),
    "DiffusionModelUNet": ("DiffusionModelUNet", DIFFUSION, (1, 16, 16), "x"),
    "DiffusionModelUNet/conditioned": (
        *("DiffusionModelUNet", {**DIFFUSION, "with_conditioning": True, "cross_attention_dim": 6}),
        *((1, 16, 16), "x"),
    ),
    "ControlNet": (
        "ControlNet",
        {**{k: v for k, v in DIFFUSION.items() if k != "out_channels"}, "conditioning_embedding_in_channels": 1,
         "conditioning_embedding_num_channels": (8,)},
        *((1, 16, 16), "x"),
    ),
    "DynUNet": (
        *("DynUNet", {**TWO, "kernel_size": (3, 3, 3), "strides": (1, 2, 2), "upsample_kernel_size": (2, 2),
                      "filters": (8, 16, 32)}),
        *((1, 32, 32), "x"),
    ),
    "DynUNet/res": (
        *("DynUNet", {**TWO, "kernel_size": (3, 3, 3), "strides": (1, 2, 2), "upsample_kernel_size": (2, 2),
                      "filters": (8, 16, 32), "res_block": True, "trans_bias": True}),
        *((1, 32, 32), "x"),
    ),
    "EfficientNetBN": ("EfficientNetBN", {"model_name": "efficientnet-b0", "pretrained": False, "spatial_dims": 2,
                                          "in_channels": 1, "num_classes": 3}, (1, 64, 64), "inputs"),
    "EfficientNetBNFeatures": (
        "EfficientNetBNFeatures",
        {"model_name": "efficientnet-b0", "pretrained": False, "spatial_dims": 2, "in_channels": 1},
        *((1, 64, 64), "inputs"),
    ),
    "FlexibleUNet": (
        "FlexibleUNet",
        {"in_channels": 1, "out_channels": 3, "backbone": "resnet18", "pretrained": False, "spatial_dims": 2},
        *((1, 64, 64), "inputs"),
    ),
    "FullyConnectedNet": ("FullyConnectedNet", {"in_channels": 8, "out_channels": 3, "hidden_channels": (16, 12)},
                          (8,), "input"),
    "VarFullyConnectedNet": (
        "VarFullyConnectedNet",
        {"in_channels": 8, "out_channels": 3, "latent_size": 4, "encode_channels": (16, 12), "decode_channels": (12,)},
        *((8,), "x"),
    ),
    "Generator": ("Generator", {"latent_shape": (6,), "start_shape": (8, 4, 4), "channels": (8, 1), "strides": (2, 1)},
                  (6,), "x"),
    "GlobalNet": (
        "GlobalNet",
        {"image_size": (16, 16), "spatial_dims": 2, "in_channels": 2, "num_channel_initial": 8, "depth": 2},
        *((2, 16, 16), "x"),
    ),
    "LocalNet": (
        "LocalNet",
        {"spatial_dims": 2, "in_channels": 2, "num_channel_initial": 8, "extract_levels": (0, 1),
         "out_kernel_initializer": "kaiming_uniform", "out_activation": None},
        *((2, 16, 16), "x"),
    ),
    "RegUNet": ("RegUNet", {"spatial_dims": 2, "in_channels": 2, "num_channel_initial": 8, "depth": 2},
                (2, 16, 16), "x"),
    "HighResNet": ("HighResNet", TWO, (1, 16, 16), "x"),
    "HoVerNet": ("HoVerNet", {"mode": "fast", "in_channels": 3, "out_classes": 3}, (3, 256, 256), "x"),
    "MaskedAutoEncoderViT": (
        "MaskedAutoEncoderViT",
        {"in_channels": 1, "img_size": 16, "patch_size": 4, "spatial_dims": 2, "hidden_size": 24, "mlp_dim": 32,
         "num_layers": 2, "num_heads": 3, "decoder_hidden_size": 16, "decoder_mlp_dim": 24, "decoder_num_layers": 1,
         "decoder_num_heads": 2},
        *((1, 16, 16), "x"),
    ),
    "MedNeXt": ("MedNeXt", {**TWO, "init_filters": 8}, (1, 64, 64), "x"),
    "MILModel/mean": ("MILModel", {"num_classes": 3, "mil_mode": "mean", "pretrained": False,
                                   "backbone": "resnet18"}, (4, 3, 32, 32), "x"),
    "MILModel/att": ("MILModel", {"num_classes": 3, "mil_mode": "att", "pretrained": False, "backbone": "resnet18"},
                     (4, 3, 32, 32), "x"),
    "MILModel/att_trans": ("MILModel", {"num_classes": 3, "mil_mode": "att_trans", "pretrained": False,
                                        "backbone": "resnet18"}, (4, 3, 32, 32), "x"),
    "MultiScalePatchDiscriminator": (
        "MultiScalePatchDiscriminator",
        {"num_d": 2, "num_layers_d": 2, "spatial_dims": 2, "channels": 8, "in_channels": 1, "minimum_size_im": 64},
        *((1, 64, 64), "i"),
    ),
    "PatchDiscriminator": (
        "PatchDiscriminator",
        {"spatial_dims": 2, "channels": 8, "in_channels": 1, "out_channels": 1, "num_layers_d": 2},
        *((1, 32, 32), "x"),
    ),
    "Quicknat": ("Quicknat", {"num_classes": 3, "num_channels": 1, "num_filters": 8},
                 (1, 32, 32), "input"),
    "Regressor": ("Regressor", {"in_shape": (1, 16, 16), "out_shape": (2,), "channels": (8, 16), "strides": (2, 2)},
                  (1, 16, 16), "x"),
    "Discriminator": ("Discriminator", {"in_shape": (1, 16, 16), "channels": (8, 16), "strides": (2, 2)},
                      (1, 16, 16), "x"),
    "ResNet/10": ("resnet10", RES, (1, 32, 32), "x"),
    "ResNet/50": ("ResNet", {**RES, "block": "bottleneck", "layers": (1, 1, 1, 1), "block_inplanes": (8, 16, 24, 32)},
                  (1, 32, 32), "x"),
    "ResNet/shortcut_a": ("ResNet", {**RES, "block": "basic", "layers": (1, 1, 1, 1), "shortcut_type": "A",
                                     "block_inplanes": (8, 16, 24, 32)}, (1, 32, 32), "x"),
    "ResNetFeatures": ("ResNetFeatures", {"model_name": "resnet10", "pretrained": False, "spatial_dims": 2,
                                          "in_channels": 1}, (1, 32, 32), "inputs"),
    "SegResNet": ("SegResNet", {**TWO, "init_filters": 8, "blocks_down": (1, 1, 1), "blocks_up": (1, 1)},
                  (1, 32, 32), "x"),
    "SegResNet/deconv": (
        *("SegResNet", {**TWO, "init_filters": 8, "blocks_down": (1, 1), "blocks_up": (1,), "upsample_mode": "deconv",
                        "norm": ("INSTANCE", {"affine": True})}),
        *((1, 32, 32), "x"),
    ),
    "SegResNetDS": ("SegResNetDS", {**TWO, "init_filters": 8, "blocks_down": (1, 1, 1), "dsdepth": 2},
                    (1, 32, 32), "x"),
    "SegResNetDS2": ("SegResNetDS2", {**TWO, "init_filters": 8, "blocks_down": (1, 1, 1)}, (1, 32, 32), "x"),
    "SegResNetVAE": (
        "SegResNetVAE",
        {**TWO, "input_image_size": (32, 32), "init_filters": 8, "blocks_down": (1, 1, 1), "blocks_up": (1, 1),
         "vae_estimate_std": False},
        *((1, 32, 32), "x"),
    ),
    "SENet154": ("SENet", {"spatial_dims": 2, "in_channels": 1, "num_classes": 3, "block": "se_bottleneck",
                           "layers": (1, 1, 1, 1), "groups": 8, "reduction": 8, "inplanes": 64}, (1, 64, 64), "x"),
    "SEResNet": ("SENet", {"spatial_dims": 2, "in_channels": 1, "num_classes": 3, "block": "se_resnet_bottleneck",
                           "layers": (1, 1, 1, 1), "groups": 1, "reduction": 8, "inplanes": 64, "input_3x3": False,
                           "downsample_kernel_size": 1}, (1, 64, 64), "x"),
    "SEResNeXt": ("SENet", {"spatial_dims": 2, "in_channels": 1, "num_classes": 3, "block": "se_resnetxt_bottleneck",
                            "layers": (1, 1, 1, 1), "groups": 8, "reduction": 8, "inplanes": 64,
                            "input_3x3": False}, (1, 64, 64), "x"),
    "SPADENet": ("SPADENet", {**TWO, "label_nc": 2, "input_shape": (16, 16), "channels": [8, 16], "z_dim": 4,
                              "is_vae": False}, (1, 16, 16), "seg"),
    "SPADEAutoencoderKL": (
        "SPADEAutoencoderKL",
        {**TWO, "label_nc": 2, "num_res_blocks": (1, 1), "channels": (8, 16), "attention_levels": (False, True),
         "latent_channels": 4, "norm_num_groups": 4, "spade_intermediate_channels": 8},
        *((1, 16, 16), "x"),
    ),
    "SPADEDiffusionModelUNet": (
        *("SPADEDiffusionModelUNet", {**DIFFUSION, "label_nc": 2, "spade_intermediate_channels": 8}),
        *((1, 16, 16), "x"),
    ),
    "SwinUNETR": ("SwinUNETR", {**TWO, "feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)},
                  (1, 64, 64), "x_in"),
    "SwinUNETR/v2": (
        *("SwinUNETR", {**TWO, "feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "use_v2": True}),
        *((1, 64, 64), "x_in"),
    ),
    "TorchVisionFCModel": ("TorchVisionFCModel", {"model_name": "resnet18", "num_classes": 3, "pretrained": False},
                           (3, 224, 224), "x"),
    "DecoderOnlyTransformer": (
        "DecoderOnlyTransformer",
        {"num_tokens": 20, "max_seq_len": 12, "attn_layers_dim": 16, "attn_layers_depth": 2, "attn_layers_heads": 2},
        *((9,), "x"),
    ),
    "DecoderOnlyTransformer/cross": (
        "DecoderOnlyTransformer",
        {"num_tokens": 20, "max_seq_len": 12, "attn_layers_dim": 16, "attn_layers_depth": 2, "attn_layers_heads": 2,
         "with_cross_attention": True},
        *((9,), "x"),
    ),
    "UNet": ("UNet", {**TWO, "channels": (8, 16, 32), "strides": (2, 2)}, (1, 32, 32), "x"),
    "UNet/res": ("UNet", {**TWO, "channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 2}, (1, 32, 32), "x"),
    "UNet/3d": ("UNet", {**TWO, "spatial_dims": 3, "channels": (8, 16), "strides": (2,), "norm": "BATCH"},
                (1, 16, 16, 16), "x"),
    "UNETR": ("UNETR", {**TWO, "img_size": 32, "feature_size": 8, "hidden_size": 24, "mlp_dim": 32, "num_heads": 3},
              (1, 32, 32), "x_in"),
    "VarAutoEncoder": (
        "VarAutoEncoder",
        {"spatial_dims": 2, "in_shape": (1, 16, 16), "out_channels": 1, "latent_size": 4, "channels": (8, 16),
         "strides": (2, 2)},
        *((1, 16, 16), "x"),
    ),
    "ViT": ("ViT", {"in_channels": 1, "img_size": 16, "patch_size": 4, "hidden_size": 24, "mlp_dim": 32,
                    "num_layers": 2, "num_heads": 3, "spatial_dims": 2, "classification": True, "num_classes": 3},
            (1, 16, 16), "x"),
    "ViT/perceptron": (
        "ViT",
        {"in_channels": 1, "img_size": 16, "patch_size": 4, "hidden_size": 24, "mlp_dim": 32, "num_layers": 2,
         "num_heads": 3, "spatial_dims": 2, "proj_type": "perceptron", "pos_embed_type": "sincos"},
        *((1, 16, 16), "x"),
    ),
    "ViTAutoEnc": ("ViTAutoEnc", {"in_channels": 1, "img_size": 16, "patch_size": 4, "hidden_size": 24, "mlp_dim": 32,
                                  "num_layers": 2, "num_heads": 3, "spatial_dims": 2, "out_channels": 1},
                   (1, 16, 16), "x"),
    "VNet": ("VNet", {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}, (1, 32, 32), "x"),
    "VoxelMorphUNet": ("VoxelMorphUNet", {"spatial_dims": 2, "in_channels": 2, "unet_out_channels": 8,
                                          "channels": (8, 8, 8, 8, 8, 8), "final_conv_channels": (8,)},
                       (2, 32, 32), "concatenated_pairs"),
    "VoxelMorph": ("VoxelMorph", {}, (1, 32, 32, 32), "moving"),
    "VQVAE": (
        "VQVAE",
        {"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": (8, 16), "num_res_layers": 1,
         "num_res_channels": (8, 16), "downsample_parameters": ((2, 4, 1, 1),) * 2,
         "upsample_parameters": ((2, 4, 1, 1, 0),) * 2, "num_embeddings": 12, "embedding_dim": 6},
        *((1, 16, 16), "images"),
    ),
}  # fmt: skip


def names() -> list[str]:
    import monai.networks.nets  # noqa: F401  # before the bench forks

    return list(MODELS)


def families() -> dict[str, str]:
    return by_prefix(MODELS)


def make(name: str) -> Live:
    from monai.networks import nets

    kind, options, shape, what = MODELS[name]
    torch.manual_seed(0)
    frozen = "the features of every layer are returned" if name.endswith("PatchDiscriminator") else ""
    return Live(getattr(nets, kind)(**options), _drawn(name, shape, what), frozen=frozen)


def _drawn(name: str, shape: Sequence[int], what: str) -> Draw:
    def draw(g: torch.Generator, n: int) -> dict[str, torch.Tensor]:
        x = torch.randn(n, *shape, generator=g)
        batch = {what: torch.randint(0, 20, x.shape, generator=g) if name.startswith("DecoderOnly") else x}
        if "Diffusion" in name or name == "ControlNet":
            batch["timesteps"] = torch.arange(n) * 7 + 3
        if name == "DiffusionModelUNet/conditioned":
            batch["context"] = torch.randn(n, 4, 6, generator=g)
        if name == "ControlNet":
            batch["controlnet_cond"] = torch.randn(n, 1, 16, 16, generator=g)
        if name.startswith("SPADE"):
            labels = torch.randint(0, 2, (n, 16, 16), generator=g)
            batch["seg"] = torch.nn.functional.one_hot(labels, 2).permute(0, 3, 1, 2).float()
        if name.endswith("/cross"):
            batch["context"] = torch.randn(n, 5, 16, generator=g)
        if name == "VoxelMorph":
            batch["fixed"] = torch.randn(n, *shape, generator=g)
        return batch

    return draw
