"""What the names of a configuration's fields do not tell: values that single model types need when they shrink."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def _each(types: Iterable[str], fields: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {t: dict(fields) for t in types}


_QWEN, _GLM = [16, 24, 24], [8, 12, 12]
SECTIONS: dict[str, list[int]] = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "paddleocr_vl_text"), _QWEN),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_talker", "qwen2_5_omni_thinker", "paddleocr_vl"), _QWEN),
    "ernie4_5_vl_moe_text": [22, 22, 20],
    **dict.fromkeys(("glm4v_text", "glm4v_moe_text", "glm_ocr_text", "glm_image_text"), _GLM),
}
"""Sections of rotary positions (time, height, width) that a model takes where its configuration states none."""

SPECIAL: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {64: 8}, "max_value_projector_patch_to_query_dict": 8},
    **_each(("granite_speech", "granite_speech_plus"), {"window_size": 4, "downsample_rate": 2}),
    "clap_audio_model": {
        **{"patch_embeds_hidden_size": 16, "hidden_size": 128, "num_attention_heads": [2, 4, 8, 16]},
        **{"spec_size": 128, "num_mel_bins": 32, "window_size": 4},
    },
    "clvp_encoder": {"num_attention_heads": 2},
    "donut-swin": {"patch_size": 2},
    "dory": {
        **{"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
        **{"layer_types": None},
    },
    "edgetam_vision_model": {
        "backbone_channel_list": [384, 192, 96, 48],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    },
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
    "align_vision_model": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
    **_each(("grounding-dino", "mm-grounding-dino"), {"d_model": 64}),
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32},
    "gemma3n": {"vision_soft_tokens_per_image": 256},
    "gemma3n_audio": {"vocab_size": 16, "vocab_offset": 104},
    "gemma3n_text": {"vocab_size": 120, "vocab_size_per_layer_input": 88},
    "gemma3n_vision": {"vocab_size": 16, "vocab_offset": 88, "num_classes": 2, "hidden_size": 2048},
    "glm5_next_text": {"index_kpool": 2, "index_topk": 8},
    "inkling2_loop_text": {
        **{"num_hidden_layers": 4, "layer_types": ["hybrid_sliding", "hybrid"] * 2},
        **{"n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": 3},
    },
    "janus_vqgan": {"num_patches": 4, "base_channels": 32},
    "kosmos-2": {"latent_query_num": 8},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8, "input_size": 32},
    "lilt": {"hidden_size": 96},
    "llama4_vision_model": {
        **{"intermediate_size": 256, "projector_input_dim": 96, "projector_output_dim": 96, "vision_output_dim": 96},
    },
    "lw_detr_vit": {"num_windows": 4},
    "maskformer-swin": {"patch_size": 2},
    "moshi_depth": {"max_position_embeddings": 8},
    "nystromformer": {"max_position_embeddings": 8, "segment_means_seq_len": 8, "num_landmarks": 4},
    "omdet-turbo": {"encoder_in_channels": [192, 384, 768]},
    "pix2struct_text_model": {"initializer_range": 0.02},
    "qwen2_5_omni_audio_encoder": {"max_source_positions": 100},
    "qwen2_vl_vision": {"embed_dim": 64, "num_heads": 4},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 16], "num_buckets": 4},
    "sam2_hiera_det_model": {"blocks_per_stage": [1, 2, 2, 2], "global_attention_blocks": [4]},
    "sam2_vision_model": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    **_each(
        (f"{kind}_prompt_encoder" for kind in ("sam2", "sam2_video", "edgetam", "edgetam_video")),
        {"image_size": 64, "patch_size": 16},
    ),
    "sam3_vision_model": {"backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]]},
    "seggpt": {
        **{"image_size": [64, 32], "num_hidden_layers": 6, "merge_index": 1},
        **{"intermediate_hidden_state_indices": [2, 3, 4, 5]},
    },
    "superpoint": {"keypoint_decoder_dim": 65},
    "swin": {"patch_size": 2},
    "univnet": {"kernel_predictor_hidden_channels": 8},
    "videoprism_vision_model": {"image_size": 72, "num_frames": 4},
    "vitdet": {"patch_size": 16, "image_size": 64, "pretrain_image_size": 64},
    "vitpose_backbone": {"patch_size": [16, 16], "image_size": [64, 48]},
    "xcodec": {"codebook_dim": 112},
    "zamba": {
        **{"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
        **{"attention_head_dim": 32},
    },
    **_each(("emu3_vqgan", "chameleon_vqgan", "apertus1p5_vision_tokenizer"), {"base_channels": 32}),
}
"""Fields of a shrunken configuration by model type."""

WHOLE = frozenset(
    {
        "efficientloftr",
        "levit",
        "pp_lcnet",
        "pp_lcnet_v3",
        "pp_lcnet_v4",
        "uvdoc",
        "uvdoc_backbone",
        "pp_ocrv6_small_det",
    }
)
"""Small networks whose widths are written out layer by layer: only images and heads become smaller."""
