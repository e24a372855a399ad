"""Graphs of timm and transformers models, tiny or small, without the adapters: sound as traced, and hardly anything
frozen."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import transformers
from graph_helpers import in_double, on, only, seeded, sound, traced, worst_change
from tiny_transformers import MOE, configs

IDS = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 11, dtype=torch.long)
MASK[1, 7:] = 0
PICTURE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

TEXT = {"input_ids": IDS, "attention_mask": MASK}
BOTH = {**TEXT, "decoder_input_ids": IDS[:, :5]}
FAMILIES = {
    "BertForMaskedLM": (TEXT, 0.95),
    "BertForSequenceClassification": (TEXT, 0.95),
    "RobertaForSequenceClassification": (TEXT, 0.95),
    "GPT2LMHeadModel": (TEXT, 0.95),
    "LlamaForCausalLM": (TEXT, 0.95),
    "Qwen3ForCausalLM": (TEXT, 0.95),
    "T5ForConditionalGeneration": (BOTH, 0.95),
    "BartForConditionalGeneration": (BOTH, 0.95),
    "ViTForImageClassification": ({"pixel_values": PICTURE}, 0.95),
    "SwinForImageClassification": ({"pixel_values": PICTURE}, 0.95),
    "ResNetForImageClassification": ({"pixel_values": PICTURE}, 0.95),
    "WhisperForConditionalGeneration": (
        {"input_features": torch.randn(2, 20, 60), "decoder_input_ids": IDS[:, :5]}, 0.95
    ),
}  # fmt: skip


def logits(model, inputs):
    return model(**inputs, use_cache=False).logits if "input_ids" in inputs else model(**inputs).logits


def built(name: str, attention: str = "sdpa"):
    content = configs().get(name, MOE)
    config = transformers.AutoConfig.for_model(**copy.deepcopy(content))
    if name != "ResNetForImageClassification":
        config._attn_implementation = attention
    return getattr(transformers, name)(config)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers(name):
    inputs, share = FAMILIES[name]
    graph = sound(lambda: built(name, "eager" if name.startswith("ResNet") else "sdpa"), inputs, logits, tolerance=1e-6)
    assert graph.unknown_ops == {}
    assert graph.share >= share


@pytest.mark.parametrize("name", ["BertForMaskedLM", "LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_the_attention_kernel_does_not_matter(name):
    inputs = FAMILIES[name][0]
    spaces = []
    for kernel in ("eager", "sdpa"):
        graph = traced(seeded(lambda kernel=kernel: built(name, kernel)), in_double(inputs), logits)
        spaces.append(sorted((s.size, s.blocks, len(s.parents), len(s.axes)) for s in graph.spaces))
    assert spaces[0] == spaces[1]


def test_bert_heads():
    graph = sound(lambda: built("BertForMaskedLM"), TEXT, logits)
    for layer in range(2):
        at = f"bert.encoder.layer.{layer}.attention"
        query, value = only(graph, f"{at}.self.query.weight", 0), only(graph, f"{at}.self.value.weight", 0)
        assert (query.size, query.blocks, value.size, value.blocks) == (32, 4, 32, 4)
        assert query.parents == value.parents and graph.by_id[query.parents[0]].size == 4
    stream = only(graph, "bert.embeddings.word_embeddings.weight", 1)
    assert stream.size == 32
    assert only(graph, "bert.embeddings.LayerNorm.weight", 0) is stream
    # the prediction head has a width of its own, tied to the embedding by the decoder's weight
    assert only(graph, "cls.predictions.decoder.weight", 1) is stream
    assert not on(graph, "bert.embeddings.word_embeddings.weight", 0)


def test_llama_groups_and_rotary_pairs():
    graph = sound(lambda: built("LlamaForCausalLM"), TEXT, logits, tolerance=1e-6)
    for layer in range(2):
        at = f"model.layers.{layer}.self_attn"
        (keys,), values = on(graph, f"{at}.k_proj.weight", 0), only(graph, f"{at}.v_proj.weight", 0)
        assert (keys.size, keys.blocks) == (2, 1), "rotary positions leave the key heads alone to move"
        assert (values.size, values.blocks, values.parents) == (16, 2, (keys.id,))
        queries = only(graph, f"{at}.q_proj.weight", 0)
        assert (queries.size, queries.blocks, queries.parents) == (4, 2, (keys.id,))
        assert only(graph, f"model.layers.{layer}.mlp.gate_proj.weight", 0).size == 48
    assert only(graph, "model.embed_tokens.weight", 1).size == 32


def test_mixtral():
    """Experts of a stacked tensor; the grouped kernel refuses float64."""
    torch.manual_seed(0)
    model = built("MixtralForCausalLM", "eager")
    model.set_experts_implementation("eager")
    seeded_model = seeded(lambda: model)
    graph = traced(seeded_model, TEXT, logits)
    assert worst_change(graph, seeded_model, TEXT, logits) < 1e-6
    assert graph.share > 0.95


TIMM = {
    "test_resnet": 64, "test_convnext": 64, "test_convnext2": 64, "test_convnext3": 64, "test_vit": 64, "test_vit2": 64,
    "test_vit3": 64, "test_vit4": 64, "test_efficientnet": 64, "test_efficientnet_gn": 64, "test_efficientnet_ln": 64,
    "test_efficientnet_evos": 64, "test_byobnet": 64, "test_mambaout": 64, "test_nfnet": 64, "test_csatv2": 64,
}  # fmt: skip


def picture(size: int):
    return (torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)),)


@pytest.mark.parametrize("name", [n for n in TIMM if n in timm.list_models("test_*")])
def test_timm_test_models(name):
    kwargs = {"img_size": 64} if "vit" in name or "csat" in name else {}
    graph = sound(lambda: timm.create_model(name, num_classes=5, **kwargs), picture(TIMM[name]), tolerance=1e-6)
    assert graph.unknown_ops == {}
    assert graph.share > 0.95


@pytest.mark.parametrize(
    ("name", "size", "kwargs"),
    [
        ("resnet10t", 32, {}),
        ("vit_tiny_patch16_224", 32, {"img_size": 32, "depth": 2}),
        ("convnext_atto", 32, {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
        ("efficientnet_lite0", 32, {}),
        ("mixer_s32_224", 64, {"img_size": 64}),
        ("densenet121", 32, {"growth_rate": 4, "block_config": (2, 2, 2, 2)}),
        ("swin_tiny_patch4_window7_224", 32,
         {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (2, 2), "num_heads": (3, 6)}),
        ("regnetx_002", 32, {}),
        ("beit_base_patch16_224", 32, {"img_size": 32, "embed_dim": 24, "num_heads": 3, "depth": 2}),
        ("seresnext26d_32x4d", 32, {"base_width": 1}),
    ],
)  # fmt: skip
def test_timm_models(name, size, kwargs):
    graph = sound(lambda: timm.create_model(name, num_classes=5, **kwargs), picture(size), tolerance=1e-6)
    assert graph.unknown_ops == {}
    assert graph.share > (0.8 if name == "swin_tiny_patch4_window7_224" else 0.95)
    if name.startswith("mixer"):
        assert {s.size for s in graph.spaces} == {256, 512, 2048}
