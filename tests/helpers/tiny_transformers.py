"""Tiny configs of Hugging Face families: each is built and run in a fraction of a second."""

from __future__ import annotations

from typing import Any

_TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
_DECODER = {**_TEXT, "num_key_value_heads": 2}
_GPT2 = {
    "vocab_size": 99,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 40,
    "bos_token_id": 98,
    "eos_token_id": 98,
}
_SEQ2SEQ = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 40,
}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_CLIP_TEXT = {**_TEXT, **_IDS}

_FAMILIES: list[tuple[str, str, dict[str, Any]]] = [
    ("bert", "BertModel", _TEXT),
    ("bert", "BertForMaskedLM", _TEXT),
    ("bert", "BertForSequenceClassification", {**_TEXT, "num_labels": 3}),
    ("bert", "BertForTokenClassification", _TEXT),
    ("bert", "BertForQuestionAnswering", _TEXT),
    ("bert", "BertForMultipleChoice", _TEXT),
    ("distilbert", "DistilBertForMaskedLM",
     {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40}),
    ("roberta", "RobertaForSequenceClassification", {**_TEXT, "pad_token_id": 1}),
    ("gpt2", "GPT2LMHeadModel", _GPT2),
    ("gpt2", "GPT2ForSequenceClassification", _GPT2),
    ("llama", "LlamaForCausalLM", _DECODER),
    ("mistral", "MistralForCausalLM", _DECODER),
    ("qwen3", "Qwen3ForCausalLM", {**_DECODER, "head_dim": 8}),
    ("xlnet", "XLNetLMHeadModel", {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
    ("t5", "T5ForConditionalGeneration",
     {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
      "decoder_start_token_id": 0}),
    ("bart", "BartForConditionalGeneration", _SEQ2SEQ),
    ("bart", "BartForSequenceClassification", _SEQ2SEQ),
    ("vit", "ViTForImageClassification", {**_VISION, "num_labels": 5}),
    ("vit", "ViTModel", _VISION),
    ("swin", "SwinForImageClassification",
     {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
      "num_labels": 4}),
    ("resnet", "ResNetForImageClassification",
     {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 1], "layer_type": "basic", "num_labels": 4}),
    ("clip", "CLIPModel", {"text_config": _CLIP_TEXT, "vision_config": _VISION, "projection_dim": 24}),
    ("whisper", "WhisperForConditionalGeneration",
     {**_SEQ2SEQ, **_IDS, "num_mel_bins": 20, "max_source_positions": 30, "max_target_positions": 40,
      "decoder_start_token_id": 3}),
    ("qwen2_audio", "Qwen2AudioForConditionalGeneration",
     {"audio_config": {"model_type": "qwen2_audio_encoder", "d_model": 32, "encoder_layers": 1,
                       "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "num_mel_bins": 16,
                       "max_source_positions": 30},
      "text_config": {"model_type": "qwen2", **_DECODER}, "audio_token_index": 60}),
    ("wav2vec2", "Wav2Vec2ForCTC",
     {**_TEXT, "vocab_size": 32, "conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2],
      "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}),
    ("llava", "LlavaForConditionalGeneration",
     {"text_config": {**_DECODER, "model_type": "llama"},
      "vision_config": {**_VISION, "model_type": "clip_vision_model"}, "image_token_index": 97}),
]  # fmt: skip

MOE = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    **_DECODER,
    "num_local_experts": 4,
}
"""A mixture of experts: saved one expert per tensor, stacked when loaded."""


def configs() -> dict[str, dict[str, Any]]:
    """Class name -> content of its config.json."""
    return {name: {"model_type": kind, "architectures": [name], **c} for kind, name, c in _FAMILIES}
