"""Shrunken configurations: small, of the same class, with every kind of layer, and consistent."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergeid_transformers import TransformersAdapter
from mergeid_transformers.configs import library_config
from mergeid_transformers.shrink import shrunken

from mergeid.plugins import Architecture

NAMED = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "mamba": "MambaForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertForMaskedLM",
    "deberta-v2": "DebertaV2ForMaskedLM",
    "vit": "ViTForImageClassification",
    "swin": "SwinForImageClassification",
    "clip": "CLIPModel",
    "whisper": "WhisperForConditionalGeneration",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeForConditionalGeneration",
    "xcodec2": "Xcodec2Model",
}


@pytest.mark.parametrize("name", NAMED)
def test_small_and_runs(name):
    adapter = TransformersAdapter()
    config = shrunken(library_config(name, None))
    assert type(config) is type(library_config(name, None))
    arch = Architecture("transformers", name, {"config": config.to_dict(), "model_class": NAMED[name]})
    model = adapter.build(arch)
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
    with torch.no_grad():
        output = adapter.forward(model, adapter.example_inputs(arch, model, torch.Generator().manual_seed(0)))
    assert torch.isfinite(output).all()


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_next", "jamba", "gpt_oss", "lfm2", "llama4_text"])
def test_every_kind_of_layer_remains(name):
    full = library_config(name, None)
    small = shrunken(full)
    lists = {n: v for n, v in vars(full).items() if isinstance(v, list) and len(v) == full.num_hidden_layers}
    kinds = {n: v for n, v in lists.items() if all(isinstance(x, str) for x in v)}
    assert small.num_hidden_layers <= 4
    for field, values in kinds.items():
        now = getattr(small, field)
        assert len(now) == small.num_hidden_layers and set(now) == set(values)


def test_what_only_the_network_knows_stays():
    """Places on a page that the network finds itself, and stages of a tower that only its name tells."""
    full = library_config("pp_doclayout_v2", None)
    small = shrunken(full)
    assert small.reading_order_config.max_2d_position_embeddings == 1024
    assert small.reading_order_config.hidden_size < full.reading_order_config.hidden_size
    small = shrunken(library_config("omdet-turbo", None))
    assert list(small.backbone_config.out_indices) == [1, 2, 3]
    assert list(small.encoder_in_channels) == [192, 384, 768]


def test_relations_between_fields():
    small = shrunken(library_config("blip-2", None))
    assert small.qformer_config.encoder_hidden_size == small.vision_config.hidden_size
    small = shrunken(library_config("deepseek_v3", None))
    assert small.qk_head_dim == small.qk_rope_head_dim + small.qk_nope_head_dim
    small = shrunken(library_config("mamba2", None))
    assert small.num_heads * small.head_dim == small.expand * small.hidden_size
    small = shrunken({"model_type": "llama", "hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8,
                      "num_hidden_layers": 80, "intermediate_size": 28672, "vocab_size": 128256})  # fmt: skip
    assert small.head_dim * small.num_attention_heads == small.hidden_size
    assert (small.num_attention_heads, small.num_key_value_heads, small.num_hidden_layers) == (4, 2, 2)
    widths = {small.hidden_size, small.intermediate_size, small.vocab_size, small.head_dim, small.num_attention_heads}
    assert len(widths) == 5


def test_a_content_is_as_good_as_a_configuration():
    full = library_config("bert", None)
    assert shrunken(full).to_dict() == shrunken({**full.to_dict(), "model_type": "bert"}).to_dict()


@settings(max_examples=30, deadline=None)
@given(
    heads=st.sampled_from([1, 2, 4, 8, 12, 24, 64]),
    groups=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([32, 64, 128]),
    layers=st.integers(1, 90),
    mlp=st.integers(8, 30000),
    vocabulary=st.integers(4, 200_000),
)
def test_any_llama(heads, groups, head_dim, layers, mlp, vocabulary):
    keys = heads // groups if heads % groups == 0 else heads
    content = {
        "model_type": "llama",
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "num_hidden_layers": layers,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
    }
    small = shrunken(content)
    assert small.num_hidden_layers == min(layers, 2) and small.vocab_size <= vocabulary
    assert small.num_attention_heads % small.num_key_value_heads == 0
    assert (small.num_key_value_heads < small.num_attention_heads) == (keys < heads)
    assert small.hidden_size == small.num_attention_heads * small.head_dim and small.head_dim % 2 == 0
