"""Low-rank adapters (PEFT) on a model: their ranks are neurons of their own, their outer sides follow the layer's."""

from __future__ import annotations

import peft
import pytest
from graph_helpers import only, sound
from test_graph_library import TEXT, built, logits


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "bias": "lora_only"}])
def test_lora(options):
    config = peft.LoraConfig(r=5, target_modules=["q_proj", "v_proj", "down_proj"], **options)
    graph = sound(lambda: peft.get_peft_model(built("LlamaForCausalLM"), config), TEXT, logits, tolerance=1e-6)
    assert graph.unknown_ops == {} and graph.share > 0.95
    at = "base_model.model.model.layers.0"
    down = f"{at}.mlp.down_proj"
    rank = only(graph, f"{down}.lora_A.default.weight", 0)
    assert rank.size == 5 and rank is only(graph, f"{down}.lora_B.default.weight", 1)
    hidden = only(graph, f"{down}.base_layer.weight", 1)
    assert hidden.size == 48 and hidden is only(graph, f"{down}.lora_A.default.weight", 1)
    stream = only(graph, f"{down}.base_layer.weight", 0)
    assert stream is only(graph, f"{down}.lora_B.default.weight", 0)
    value = only(graph, f"{at}.self_attn.v_proj.base_layer.weight", 0)
    assert value is only(graph, f"{at}.self_attn.v_proj.lora_B.default.weight", 0)
