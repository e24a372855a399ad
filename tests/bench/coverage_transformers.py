"""transformers' model types for the coverage table: a task model of each, from a shrunken configuration.

``TYPE`` runs scaled-dot-product attention where the type has it; ``TYPE:eager`` is the same model with the attention
written out.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from coverage_check import Batch, Case

from mergeid.plugins import Architecture, MergeidError, get_adapter

EAGER = ":eager"
# Task heads with logits come before base models.
ORDER = (
    *("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM", "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"),
    *("CTC", "RNNT", "TDT", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION"),
    *("OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION", "INSTANCE_SEGMENTATION", "SEMANTIC_SEGMENTATION"),
    *("DEPTH_ESTIMATION", "ZERO_SHOT_OBJECT_DETECTION", "ZERO_SHOT_IMAGE_CLASSIFICATION", "MASK_GENERATION"),
    *("VISUAL_QUESTION_ANSWERING", "DOCUMENT_QUESTION_ANSWERING", "TABLE_QUESTION_ANSWERING", "KEYPOINT_MATCHING"),
    *("KEYPOINT_DETECTION", "POSE_ESTIMATION", "TEXT_RECOGNITION", "TABLE_RECOGNITION", "IMAGE_TO_IMAGE"),
    *("IMAGE_MATTING", "NORMAL_ESTIMATION", "POINTMAP_ESTIMATION", "TIME_SERIES_PREDICTION", "RETRIEVAL"),
    *("TEXT_TO_WAVEFORM", "TEXT_TO_SPECTROGRAM", "IMAGE_SEGMENTATION", "DECISION", "SEQUENCE_CLASSIFICATION"),
    *("TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "MULTIPLE_CHOICE", "PRETRAINING"),
)


def names() -> list[str]:
    # imported before the bench forks: its processes share them
    import transformers.models.auto.modeling_auto
    import transformers.utils.auto_docstring  # noqa: F401
    from mergeid_transformers import adapter, arguments, inputs, labels, media, shrink, tasks  # noqa: F401
    from mergeid_transformers.configs import model_types
    from transformers import modeling_utils  # noqa: F401

    import mergeid.neuron_graph.trace
    import mergeid.neuron_graph.verify  # noqa: F401

    types = model_types()
    every = [*types, *(t + EAGER for t in types if _source(t).count("_supports_sdpa = True"))]
    return sorted(every, key=lambda n: (n.endswith(EAGER), _plain(n.removesuffix(EAGER)), n))


def _plain(model_type: str) -> bool:
    """Whether its task has logits and little else: these come last."""
    found = task_class(model_type)
    return found.endswith(("ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "Classification", "ForCTC"))


@cache
def _source(model_type: str) -> str:
    """The type's modeling file, unread by Python (importing all of them takes minutes)."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    file = Path(inspect.getfile(CONFIG_MAPPING[model_type]))
    file = file.with_name(file.name.replace("configuration_", "modeling_"))
    return file.read_text() if file.exists() else ""


def families() -> dict[str, str]:
    """Name -> folder of transformers that defines the type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return {n: CONFIG_MAPPING[n.removesuffix(EAGER)].__module__.split(".")[-2] for n in names()}


def task_class(model_type: str) -> str:
    """The class to check: with a head that gives logits where the type has one."""
    from mergeid_transformers.configs import _default_classes, classes_of, model_class
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type in CLASSES:
        return CLASSES[model_type]
    kind = CONFIG_MAPPING[model_type]
    for task in ORDER:
        for found in classes_of(model_type, f"MODEL_FOR_{task}_MAPPING_NAMES"):
            if not kind.sub_configs or model_class(model_type, found).config_class is kind:
                return found
    return next(iter(_default_classes(model_type)), "")


class NotBuilt(Exception):
    """The type gives no model that can be run here; the text says why."""

    def __init__(self, why: object) -> None:
        super().__init__(f"not built: {' '.join(str(why).split())}")


def make(name: str) -> Case:
    """Raises `NotBuilt` where there is no model of that type, or none that runs on inputs made from its config."""
    import torch
    from torch.utils._pytree import tree_leaves

    model_type = name.removesuffix(EAGER)
    if model_type in WHY_NOT:
        raise NotBuilt(WHY_NOT[model_type])
    try:
        case = _case(name)
        with torch.no_grad():
            outputs = tree_leaves(case.forward(case.model.eval(), case.inputs))
        if any(isinstance(x, torch.Tensor) and bool(x.isnan().any()) for x in outputs):
            raise MergeidError("the library's own model answers these inputs with NaN")
    except Exception as error:
        raise NotBuilt(error) from error
    return case


def _case(name: str) -> Case:
    import torch
    from mergeid_transformers.configs import library_config
    from mergeid_transformers.shrink import shrunken

    adapter: Any = get_adapter("transformers")
    model_type = name.removesuffix(EAGER)
    config = shrunken(library_config(model_type, OVERRIDES.get(model_type))).to_dict()
    if name.endswith(EAGER):
        config["attn_implementation"] = "eager"
    chosen = task_class(model_type)
    if not chosen:
        raise MergeidError("no class of its own with a forward pass (part of a larger model)")
    arch = Architecture("transformers", model_type, {"config": config, "model_class": chosen})
    torch.manual_seed(0)
    model = adapter.build(arch)

    def another(generator: torch.Generator, batch_size: int) -> Batch:
        batch = adapter.example_inputs(arch, model, generator, batch_size)
        batch.pop("labels", None)
        return batch

    return Case(model, another(torch.Generator().manual_seed(0), 2), adapter.outputs, another, type(model).__name__)


def _each(types: Iterable[str], fields: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {t: dict(fields) for t in types}


_ONE_EXPERT = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
_GEMMA_EXPERTS = {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}
_SERIES = {"prediction_length": 6, "context_length": 12}
_SPARSE = {"num_experts_per_tok": 2, "num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"]}
CLASSES = {"flava": "FlavaModel", "reformer": "ReformerModelWithLMHead"}
"""Where the head trains on targets that only its processor makes, or refuses what its model needs."""
_SESSION = "its forward takes a video session object, no tensors"
_PARTS = "its forward does not run its parts: they are called by generate()"
WHY_NOT = {
    **dict.fromkeys(("sam2_video", "sam3_video", "sam3_tracker_video", "edgetam_video"), _SESSION),
    **dict.fromkeys(("bark", "qwen2_5_omni", "qwen2_5_omni_token2wav", "qwen3_omni_moe", "glm_image_vqmodel"), _PARTS),
    **dict.fromkeys(("chameleon", "emu3"), "its image tokens are listed in the checkpoint's vocabulary map only"),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "it reads the key-value cache of another model"),
    "rag": "a retriever with an index of documents belongs to it",
    "nougat": "an alias of vision-encoder-decoder whose default configuration names no known part",
    "esmfold2": "its inputs are featurised proteins",
}
"""Types that are no models by themselves, and why."""
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [16, 16, 16, 16]}
_REPVIT = {
    **{"model_type": "timm_wrapper", "architecture": "repvit_m1"},
    "model_args": {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]},
    "num_classes": 2,
}
_QSA = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256}
_QSA |= {"indexer_budget": 64, "indexer_compress_ratio": 4}
OVERRIDES: dict[str, dict[str, Any]] = {
    "deepseek_ocr2_vision": {
        "encoder_config": {"hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2}
    },
    "pp_doclayout_v2": {"class_thresholds": [0.5] * 5, "class_order": [0, 1, 2, 3, 4]},
    "hunyuan_vl_text": {"rope_parameters": _MROPE, "head_dim": 128},
    "edgetam": {"vision_config": {"backbone_config": _REPVIT}},
    "edgetam_vision_model": {"backbone_config": _REPVIT},
    "qwen4_exp": {"text_config": _QSA},
    "t5gemma2_encoder": {"dropout_rate": 0.0, "text_config": {"dropout_rate": 0.0}},
    **_each(("autoformer", "informer", "time_series_transformer"), _SERIES),
    "uvdoc": {"backbone_config": {"model_type": "uvdoc_backbone", "out_indices": [1, 2, 3, 4, 5, 6]}},
    "pp_ocrv6_small_det": {"backbone_config": {"model_type": "pp_lcnet_v4", "out_indices": [1, 2, 3, 4]}},
    **_each(("blip-2", "instructblip"), {"image_token_index": 50000}),
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}}
    },
    "janus": {"vision_config": {"projection_dim": 4096}},
    "lw_detr": {"projector_scale_factors": [1.0]},
    "ovis2": {"hidden_size": 4096},
    "vitmatte": {"hidden_size": 768},
    "voxtral": {"audio_token_id": 24},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 151652},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 151652, "audio_config": {"output_dim": 2048}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 8, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": _SPARSE},
    "deepseek_ocr2_text": _SPARSE,
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma": {"text_config": _GEMMA_EXPERTS},
    "diffusion_gemma_text": _GEMMA_EXPERTS,
    "dots1": _ONE_EXPERT,
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}, "audio_config": {"model_type": "gemma4_audio"}},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "hunyuan_vl": {"text_config": {"head_dim": 128, "rope_parameters": _MROPE}},
    "instructblipvideo": {"video_token_index": 50000},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "lightglue": {"keypoint_detector_config": {"model_type": "superpoint", "max_keypoints": 32}},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 1024},
    "qwen4_exp_text": _QSA,
    "qwen3_asr": {"audio_config": {"output_dim": 2048}},
    "reformer": {"is_decoder": True},
    "shieldgemma2": {"yes_token_index": 90, "no_token_index": 91},
    "step3p5": {"sliding_window": 64},
    "step3p7": {"text_config": {"sliding_window": 64}},
    "timm_backbone": {"backbone": "test_resnet"},
    "xmod": {"languages": ["en_XX", "de_DE"], "default_language": "en_XX"},
    **_each(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), {"head_dim": 128}),
    **_each(("moonshine_streaming", "nemotron"), {"num_key_value_heads": 8}),
    **_each(("t5gemma2_decoder", "t5gemma2_text"), {"dropout_rate": 0.0}),
    **_each(("wav2vec2-bert", "wav2vec2-conformer"), {"vocab_size": 32}),
}
"""What the default configurations of some types lack, so that the library cannot build or run them."""
