"""What the names of a configuration's fields do not tell: values that single model types need when they are shrunken."""

from __future__ import annotations

from typing import Any

_QWEN, _GLM = [16, 24, 24], [8, 12, 12]
SECTIONS: dict[str, list[int]] = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "paddleocr_vl_text"), _QWEN),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_talker", "qwen2_5_omni_thinker", "paddleocr_vl"), _QWEN),
    **dict.fromkeys(("glm4v_text", "glm4v_moe_text", "glm_ocr_text", "glm_image_text"), _GLM),
}
"""Sections of rotary positions (time, height, width) that a model takes where its configuration states none."""

SPECIAL: dict[str, dict[str, Any]] = {
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
    "align_vision_model": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
    "dory": {"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    "glm5_next_text": {"index_kpool": 2, "index_topk": 8},
    "janus_vqgan": {"base_channels": 32},
    "emu3_vqgan": {"base_channels": 32},
    "chameleon_vqgan": {"base_channels": 32},
}
"""Fields of a shrunken configuration by model type."""
