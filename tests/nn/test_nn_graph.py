"""The neuron graph of asymmetric networks: the groups of the ordinary ones, with F, D and gates moving along."""

from __future__ import annotations

import pytest
import timm
import torch
from graph_helpers import change, disturbed, traced
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from mergeid import nn as mnn
from mergeid.nn.names import plain_table

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 30}
TOKENS = {"input_ids": torch.arange(12).reshape(2, 6)}
IMAGES = (torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),)


def logits(model: nn.Module, inputs) -> torch.Tensor:
    return model(**inputs).logits if isinstance(inputs, dict) else model(*inputs)


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=5)


MODELS = {
    "resnet": (lambda: timm.create_model("test_resnet", num_classes=4), IMAGES),
    "convnext": (lambda: timm.create_model("test_convnext", num_classes=4), IMAGES),
    "vit": (vit, IMAGES),
    "bert": (lambda: BertForSequenceClassification(BertConfig(**SMALL)), TOKENS),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1)), TOKENS),
}


def sizes(graph) -> list[tuple[int, int]]:
    return sorted((s.size, s.blocks) for s in graph.spaces)


@pytest.mark.parametrize("kind", ["w", "syre"])
@pytest.mark.parametrize("name", MODELS)
def test_the_group_is_that_of_the_ordinary_network(name, kind):
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make()
    ordinary = traced(disturbed(make()), inputs, logits)
    mnn.asymmetrise(model, kind, generator=torch.Generator().manual_seed(3))
    model = disturbed(model)
    graph = traced(model, inputs, logits)
    assert sizes(graph) == sizes(ordinary) and graph.unknown_ops == ordinary.unknown_ops
    assert graph.share > 0.95
    element = graph.random_element(torch.Generator().manual_seed(5))
    # Llama's RMSNorm and rotary embedding run in float32 whatever the weights are
    assert change(graph, element, model, inputs, logits) < (1e-6 if name == "llama" else 1e-9)
    # the fixed parts do move, and with their weights: permuting commutes with folding
    state = model.state_dict()
    moved = graph.apply_state(element, state)
    assert any(not torch.equal(moved[k], v) for k, v in state.items() if k.endswith("_fixed"))
    for key, value in mnn.fold_state(moved).items():
        torch.testing.assert_close(value, graph.apply(element, key, mnn.fold_state(state)[key]))


def test_weights_alone_are_no_symmetry():
    # in training F and D stand still: only an element that moves nothing keeps the function then
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4)
    mnn.asymmetrise(model, "w", generator=torch.Generator().manual_seed(3))
    model = disturbed(model)
    graph = traced(model, IMAGES, logits)
    still = graph.on_tensors(list(plain_table(model.state_dict())))
    element = graph.random_element(torch.Generator().manual_seed(5))
    assert change(graph, element, model, IMAGES, logits) < 1e-9
    assert change(still, element, model, IMAGES, logits) > 1e-3


@pytest.mark.parametrize("name", ["resnet", "vit", "bert"])
def test_gates_move_along_on_both_axes(name):
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make()
    example = inputs if isinstance(inputs, dict) else tuple(x.float() for x in inputs)
    mnn.asymmetrise(model, "sigma", generator=torch.Generator().manual_seed(3), example_inputs=example)
    model = disturbed(model)
    graph = traced(model, inputs, logits)
    assert graph.share > 0.9
    assert change(graph, graph.random_element(torch.Generator().manual_seed(5)), model, inputs, logits) < 1e-9
    for space in graph.spaces:
        for axis in space.axes:
            if axis.tensor.endswith("gate_fixed") and axis.axis == 0:
                other = next(a for a in space.axes if a.tensor == axis.tensor and a.axis == 1)
                assert (other.index == axis.index).all()
