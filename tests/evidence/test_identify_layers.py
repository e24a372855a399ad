"""Records of layers and spaces on whole models, against costs put together by hand."""

from __future__ import annotations

import json
from itertools import permutations

import numpy as np
import pytest
import torch
from graph_helpers import traced
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from mergeid.errors import MergeidError
from mergeid.evidence.function_class import FunctionClasses
from mergeid.evidence.inputs import before_batchnorm, supports
from mergeid.evidence.layers import space_records
from mergeid.evidence.separation import gamma_in, gamma_out


def run(model, batch):
    return model(**batch) if isinstance(batch, dict) else model(batch)


def tuned(model, size, seed):
    """A state dict near the model's: every weight matrix moved by `size` of its standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + size * value.std() * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        if value.dim() > 1
        else value.clone()
        for name, value in model.state_dict().items()
    }


def mlp():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x = torch.randn(64, 8, dtype=torch.float64) @ torch.diag(torch.linspace(2, 0.2, 8).double())
    return model, x


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.one = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.two = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        h = torch.relu(self.bn1(self.one(x)))
        return torch.relu(x + self.bn2(self.two(h)))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.blocks = nn.Sequential(Block(6), Block(6))
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.blocks(torch.relu(self.bn(self.stem(x)))).mean((2, 3)))


def layer_cost(base, state, name, support, free_scale=False, rows=slice(None), transposed=False):
    f, w = base[f"{name}.weight"], state[f"{name}.weight"]
    f, w = (x.T if transposed else x.flatten(1) for x in (f, w))
    return FunctionClasses(f[rows], (support,), free_scale=free_scale).costs(w[rows]).numpy()


def brute_margin(cost):
    n = len(cost)
    return min(
        cost[np.arange(n), list(p)].sum() - np.trace(cost) for p in permutations(range(n)) if p != tuple(range(n))
    )


def space_on(graph, tensor, axis):
    return next(s for s, a in graph.on_tensor[tensor] if a.axis == axis)


def test_mlp_against_costs_by_hand():
    model, x = mlp()
    graph = traced(model, (x[:4],))
    base = dict(model.state_dict())
    a, b = tuned(model, 0.2, 1), tuned(model, 0.3, 2)
    found_a = supports(model, [x], run)
    model.load_state_dict(b)
    found_b = supports(model, [x], run)
    records = space_records(graph, model, a, b, (found_a, found_b), base=base)
    assert set(records) == {s.id for s in graph.spaces} and len(records) == 2
    for name in ("0", "2"):
        record = records[space_on(graph, f"{name}.weight", 0).id]
        (layer,) = record.layers
        assert layer.layer == name and layer.source == "base" and layer.inputs == base[f"{name}.weight"].shape[1]
        support = found_a[name][0]
        assert (layer.k, layer.coherence, layer.eigengap) == (support.k, support.coherence, support.eigengap)
        classes = FunctionClasses(base[f"{name}.weight"], (support,))
        assert layer.gamma_out == gamma_out(classes) and layer.gamma_in == gamma_in(classes)
        for state, s, mine, total in ((a, found_a, layer.a, record.a), (b, found_b, layer.b, record.b)):
            cost = layer_cost(base, state, name, s[name][0])
            swap = cost + cost.T - np.diag(cost)[:, None] - np.diag(cost)[None]
            off = swap[~np.eye(len(cost), dtype=bool)]
            assert mine.margin == pytest.approx(brute_margin(cost), rel=1e-9) == total.margin
            assert mine.least_swap == pytest.approx(off.min()) and mine.bad_swaps == (off <= 0).mean()
            assert off.min() <= mine.median_swap <= off.max()
            assert mine.by_gap is not None and 0 < mine.by_norm < 1 and total.by_norm is None
        assert record.identifiable
    json.dumps({k: r.to_json() for k, r in records.items()}, allow_nan=False)
    plain = space_records(graph, model, a, b, found_a, base=base, certify=False)
    assert all(x.a.by_gap is None for r in plain.values() for x in r.layers)


def test_a_swap_by_hand_turns_that_space():
    model, x = mlp()
    graph = traced(model, (x[:4],))
    base, a, b = dict(model.state_dict()), tuned(model, 0.05, 1), tuned(model, 0.05, 2)
    found = supports(model, [x], run)
    space = space_on(graph, "0.weight", 0)
    element = graph.identity()
    element[space.id] = np.array([0, 3, 2, 1, 4, 5])
    swapped = graph.apply_state(element, b)
    records = space_records(graph, model, a, swapped, found, base=base, certify=False)
    assert records[space.id].a.identifiable and not records[space.id].b.identifiable
    assert not records[space.id].b.identity_optimal and records[space.id].b.least_swap < 0
    back = space_records(graph, model, a, graph.apply_state(element, swapped), found, base=base, certify=False)
    assert back[space.id].identifiable


def test_stored_parts_and_nothing_known():
    model, x = mlp()
    graph = traced(model, (x[:4],))
    found = supports(model, [x], run)
    a, b = tuned(model, 0.1, 1), tuned(model, 0.1, 2)
    for record in space_records(graph, model, a, b, found).values():
        assert record.layers[0].source == "nothing" and record.a.margin == 0 and not record.identifiable
        assert record.layers[0].a.by_norm == 0
    generator = torch.Generator().manual_seed(3)
    stored = {}
    for name in ("0.weight", "2.weight"):
        mask = (torch.rand(a[name].shape, generator=generator) < 0.7).double()
        noise = 3 * torch.randn(a[name].shape, generator=generator, dtype=torch.float64)
        stored |= {f"{name}_fixed": (1 - mask) * noise, f"{name}_mask": mask}
    records = space_records(graph, model, a | stored, b | stored, found, certify=False)
    for record in records.values():
        assert record.layers[0].source == "stored" and record.identifiable
    other = {k: v + 1 for k, v in stored.items()}
    with pytest.raises(MergeidError, match="layer '0': the two models do not store the same"):
        space_records(graph, model, a | stored, b | other, found)


def test_resnet_sums_the_residual_stream_and_frees_the_scale():
    torch.manual_seed(0)
    model = ResNet().double().eval()
    x = torch.randn(12, 3, 5, 5, dtype=torch.float64)
    graph = traced(model, (x[:2],))
    normed = before_batchnorm(model, x, run)
    assert normed == {"stem", *(f"blocks.{i}.{c}" for i in range(2) for c in ("one", "two"))}
    found = supports(model, [x], run, centred=dict.fromkeys(normed, True))
    base, a, b = dict(model.state_dict()), tuned(model, 0.3, 1), tuned(model, 0.3, 2)
    records = space_records(graph, model, a, b, found, base=base, before_batchnorm=normed)
    stream = records[space_on(graph, "stem.weight", 0).id]
    makers = ["stem", "blocks.0.two", "blocks.1.two"]
    assert sorted(r.layer for r in stream.layers) == sorted(makers)
    for state, record in ((a, stream.a), (b, stream.b)):
        cost = sum(layer_cost(base, state, n, found[n][0], free_scale=True) for n in makers)
        assert record.margin == pytest.approx(brute_margin(cost), rel=1e-8)
    for layer in stream.layers:
        assert layer.centred and layer.a.by_gap is None
    inner = records[space_on(graph, "blocks.0.one.weight", 0).id]
    assert [r.layer for r in inner.layers] == ["blocks.0.one"] and inner.layers[0].inputs == 54


def test_bert_heads_are_judged_block_by_block():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=10,
        max_position_embeddings=16,
    )  # fmt: skip
    model = BertForSequenceClassification(config).double().eval()
    batch = {"input_ids": torch.randint(0, 40, (16, 9), generator=torch.Generator().manual_seed(1))}
    graph = traced(model, {"input_ids": batch["input_ids"][:2]}, lambda m, x: m(**x).logits)
    found = supports(model, [batch], run)
    base, a, b = dict(model.state_dict()), tuned(model, 0.3, 1), tuned(model, 0.3, 2)
    records = space_records(graph, model, a, b, found, base=base, certify=False)
    layer = "bert.encoder.layer.0.attention.self"
    within = next(s for s, x in graph.on_tensor[f"{layer}.value.weight"] if x.axis == 0 and s.members == 4)
    assert within.blocks == 3
    record = records[within.id]
    assert [r.layer for r in record.layers] == [f"{layer}.value"]
    margins = [
        brute_margin(layer_cost(base, a, f"{layer}.value", found[f"{layer}.value"][0], rows=slice(4 * h, 4 * h + 4)))
        for h in range(3)
    ]
    assert record.a.margin == pytest.approx(min(margins), rel=1e-8)
    stream = records[space_on(graph, "bert.embeddings.word_embeddings.weight", 1).id]
    assert {"bert.embeddings.word_embeddings", "bert.encoder.layer.0.output.dense"} <= {r.layer for r in stream.layers}
    assert all(r.a.identifiable for r in records.values())


def test_gpt2_fused_rows():
    """Conv1D lies transposed, and its c_attn makes queries, keys and values at once."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2, n_positions=12, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).double().eval()
    batch = {"input_ids": torch.randint(0, 40, (16, 9), generator=torch.Generator().manual_seed(1))}
    graph = traced(model, {"input_ids": batch["input_ids"][:2]}, lambda m, x: m(**x).logits)
    found = supports(model, [batch], run)
    base, a, b = dict(model.state_dict()), tuned(model, 0.3, 1), tuned(model, 0.3, 2)
    records = space_records(graph, model, a, b, found, base=base)
    name = "transformer.h.0.attn.c_attn"
    seen = 0
    for space, axis in graph.on_tensor[f"{name}.weight"]:
        if axis.axis != 1 or space.members != 4:
            continue
        seen += 1
        costs = {}
        for copy in range(axis.positions.shape[1]):
            for block in range(2):
                rows = axis.positions[4 * block : 4 * block + 4, copy]
                cost = layer_cost(base, a, name, found[name][0], rows=rows, transposed=True)
                costs[block] = costs.get(block, 0) + cost
        expected = min(brute_margin(c) for c in costs.values())
        assert records[space.id].a.margin == pytest.approx(expected, rel=1e-8)
    assert seen >= 1


def test_depthwise_channels_follow_their_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 2, 1)).double()
    x = torch.randn(8, 3, 5, 5, dtype=torch.float64)
    graph = traced(model, (x[:2],))
    found = supports(model, [x], run)
    base = dict(model.state_dict())
    records = space_records(graph, model, tuned(model, 0.2, 1), tuned(model, 0.2, 2), found, base=base)
    depthwise = [r for record in records.values() for r in record.layers if r.layer == "1"]
    assert depthwise and all(r.a.margin == np.inf and r.a.identity_optimal for r in depthwise)
    assert depthwise[0].to_json()["a"]["margin"] is None
