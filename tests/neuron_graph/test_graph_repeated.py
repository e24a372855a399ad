"""Deep networks traced once per kind of layer: the graph is that of a trace of all layers, or all are traced."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_transformers import configs
from torch import Tensor, nn

import mergeid
from mergeid.models import graph as graphs
from mergeid.models.load import bare
from mergeid.neuron_graph import repeated
from mergeid.neuron_graph.trace import trace, trace_repeated
from mergeid.request.request import Run

GEMMA = {
    "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "vocab_size": 99, "hidden_size": 32,
    "num_hidden_layers": 13, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "sliding_window": 8,
}  # fmt: skip
DEEP: dict[str, dict[str, Any]] = {
    "BertForMaskedLM": {"num_hidden_layers": 6},
    "LlamaForCausalLM": {"num_hidden_layers": 7},
    "BartForConditionalGeneration": {"encoder_layers": 5, "decoder_layers": 6},
    "XLNetLMHeadModel": {"n_layer": 6},
    "Gemma3ForCausalLM": GEMMA,
}


@pytest.mark.parametrize("name", [*DEEP, "timm/vit_tiny_patch16_224", "timm/resnet101"])
def test_the_graph_is_that_of_all_layers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated, "LEAST", 5)
    arch = name
    if name in DEEP:
        arch = str(tmp_path / "config.json")
        Path(arch).write_text(json.dumps({**configs().get(name, {}), **DEEP[name]}))
    loaded = bare(arch, Run())
    model, batch = loaded.model, loaded.inputs

    def forward() -> Any:
        return loaded.outputs(model, batch)

    def label(axes: list[tuple[str, int]]) -> str | None:
        return loaded.adapter.space_label(loaded.arch, axes)

    keys = list(model.state_dict())
    whole = trace(model, batch, forward, label=label)
    again = trace_repeated(model, batch, forward, label=label)
    assert again is not None and list(model.state_dict()) == keys
    assert again.to_json() == whole.to_json()
    places = [{k: [(t.module, t.kind, t.call) for t in v] for k, v in g.taps.items()} for g in (whole, again)]
    assert places[0] == places[1]


class Deep(nn.Module):
    """Layers of one kind, one of which is used in another way than the others."""

    def __init__(self, odd: int | None) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 12)
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(10))
        self.head = nn.Linear(12, 3)
        self.odd = odd

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, layer in enumerate(self.layers):
            y = layer(x)
            x = x + torch.relu(y.flip(-1) if i == self.odd else y)
        return self.head(x)


def test_layers_that_only_look_alike_are_all_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "SMALL_NETWORK", 0)
    torch.manual_seed(0)
    for odd in (None, 6):
        model, x = Deep(odd).eval(), torch.randn(2, 5)
        before = copy.deepcopy(model.state_dict())
        found = mergeid.graph(model, example_inputs=x)
        monkeypatch.setattr(graphs, "SMALL_NETWORK", 10**12)
        whole = mergeid.graph(model, example_inputs=x)
        monkeypatch.setattr(graphs, "SMALL_NETWORK", 0)
        assert found.to_json()["spaces"] == whole.to_json()["spaces"] and found.spaces
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_network_that_counts_its_layers_is_traced_whole() -> None:
    class Counting(Deep):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for i in range(10):
                x = x + self.layers[i](x)
            return self.head(x)

    model, x = Counting(None).eval(), torch.randn(2, 5)
    assert trace_repeated(model, x, lambda: model(x)) is None
    assert len(model.layers) == 10
