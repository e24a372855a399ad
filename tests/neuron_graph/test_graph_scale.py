"""Graphs without weights: the meta device says what a real pass says, and a smaller model proves it."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import transformers
from graph_helpers import TwoLayers, shape
from tiny_transformers import configs
from torch import nn

import mergeid
import mergeid.models.load
from mergeid import MergeidError
from mergeid.neuron_graph.scale import proven_on
from mergeid.neuron_graph.trace import trace

IDS = {"input_ids": torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(0))}
MASKED = {**IDS, "attention_mask": torch.cat([torch.ones(2, 9), torch.zeros(2, 2)], 1).long()}
BOTH = {**MASKED, "decoder_input_ids": IDS["input_ids"][:, :5]}


def without_weights(make, inputs, output):
    """The graph of the same model on the meta device."""
    with torch.device("meta"):
        model = make().eval()
    on_meta = {k: v.to("meta") for k, v in inputs.items()}
    return trace(model, on_meta, lambda: output(model(**on_meta)), values=inputs)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("BertForMaskedLM", MASKED),
        ("GPT2LMHeadModel", MASKED),
        ("LlamaForCausalLM", MASKED),
        ("T5ForConditionalGeneration", BOTH),
        ("BartForConditionalGeneration", BOTH),
    ],
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_language_models_on_the_meta_device(name, inputs, attention):
    config = transformers.AutoConfig.for_model(**copy.deepcopy(configs()[name]))
    config._attn_implementation, config.use_cache = attention, False
    kind = getattr(transformers, name)
    real = kind(config).eval()
    graph = trace(real, inputs, lambda: real(**inputs).logits)
    assert shape(without_weights(lambda: kind(config), inputs, lambda o: o.logits)) == shape(graph)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "levit_128s", "test_vit_relpos"])
def test_vision_models_on_the_meta_device(name):
    size = 224 if name == "levit_128s" else 160
    inputs = {"x": torch.randn(1, 3, size, size)}
    real = timm.create_model(name).eval()
    graph = trace(real, inputs, lambda: real(**inputs))
    assert shape(without_weights(lambda: timm.create_model(name), inputs, lambda o: o)) == shape(graph)


class Asks(TwoLayers):
    """Control flow that depends on the weights."""

    def __init__(self):
        super().__init__(4, 8, 2)

    def forward(self, x):
        h = self.a(x)
        return self.b(h if h.sum() > 0 else -h)


def test_a_forward_pass_that_asks_for_weights_is_refused():
    with pytest.raises(MergeidError, match="needs values that depend on the weights"):
        without_weights(Asks, {"x": torch.ones(2, 4)}, lambda o: o)


class Chooses(Asks):
    """Control flow that depends on the inputs alone."""

    def forward(self, x):
        y = x[x[:, 0] > 0]
        return self.b(self.a(y) if len(y) == 1 else self.a(y) * torch.arange(8))


@pytest.mark.parametrize("rows", [1, 2])
def test_inputs_steer_the_forward_pass(rows):
    x = torch.tensor([[1.0, 2, 3, 4], [1.0 if rows == 2 else -1.0, 2, 3, 4]])
    graph = without_weights(Chooses, {"x": x}, lambda o: o)
    assert [s.size for s in graph.spaces] == ([8] if rows == 1 else [])


def net(width):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))


def traced(model):
    x = torch.randn(2, 4)
    return trace(model, (x,), lambda: model(x))


def test_what_fails_in_the_small_model_is_frozen_in_the_large_one():
    large, small = traced(net(64)), traced(net(8))
    small.verified = {"max_relative_error": 0.0, "samples": 2, "dtype": "float64"}
    good = proven_on(large, small, "a narrow net")
    assert good.share == large.share
    assert good.verified == {**small.verified, "on": "a narrow net", "places": 3, "of": 3}
    bad = small.without(["s0"], "verification: the output changed under a permutation")
    bad.verified = small.verified
    cut = proven_on(traced(net(64)), bad, "a narrow net")
    # layers of one kind share their places: 0.weight, 2.weight and 4.weight are one
    assert cut.spaces == [] and any("the output changed in a narrow net" in why for _, _, why in cut.frozen)


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "transformers/gpt2"])
def test_a_bare_architecture_that_is_too_large(name, monkeypatch):
    monkeypatch.setattr(mergeid.models.load, "HUGE", 1_000_000)
    graph = mergeid.graph(name)
    assert graph.share > 0.99
    assert "smaller model of the same code" in graph.verified["on"]
    assert graph.verified["places"] == graph.verified["of"] > 10
    assert graph.verified["max_relative_error"] < 1e-6


def test_a_graph_by_hand_of_a_model_without_weights_is_refused(monkeypatch):
    by_hand = mergeid.graph("timm/test_vit").to_json()
    monkeypatch.setattr(mergeid.models.load, "HUGE", 100_000)
    with pytest.raises(MergeidError, match="a graph written by hand cannot be verified on it"):
        mergeid.graph("timm/test_vit", graph=by_hand)
