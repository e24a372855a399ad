"""Orthogonal maps inside heads: found, proven, planted ones undone by the verbs."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graph_helpers import seeded
from torch import Generator, Tensor, nn

import mergeid
from mergeid.matchers.turning import matched_turns
from mergeid.neuron_graph.neuron_graph import NeuronGraph
from mergeid.neuron_graph.turned import FULL, HALVES, SIDE_BY_SIDE, Turnable, nearest
from mergeid.neuron_graph.turns import find_turns


def generator(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


CONFIGS = {
    "Llama": {"num_key_value_heads": 2, "intermediate_size": 40},
    "Bert": {"intermediate_size": 40},
    "GPTNeoX": {"rotary_pct": 1.0, "intermediate_size": 40},
    "GPTJ": {"rotary_dim": 8},
    "GPT2": {},
}
HEADS = {"Bert": "BertForMaskedLM", "GPT2": "GPT2LMHeadModel"}


@cache
def tiny(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model and its inputs, which no test changes."""
    import transformers

    layers = 2 if name == "GPT2" else 1
    sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "vocab_size": 96}
    config = getattr(transformers, f"{name}Config")(**sizes, **CONFIGS[name])
    model = seeded(lambda: getattr(transformers, HEADS.get(name, f"{name}ForCausalLM"))(config), seed).float()
    return model, {"input_ids": torch.randint(3, 90, (2, 7), generator=generator())}


def logits(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


@cache
def graph_of(name: str) -> NeuronGraph:
    return mergeid.graph(*tiny(name))


@cache
def found(name: str) -> list[Turnable]:
    model, batch = tiny(name)
    return find_turns(graph_of(name), model, batch, lambda m, x: m(**x).logits, generator=generator())


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("Llama", {FULL, HALVES}),  # values; queries and keys under rotary positions
        ("Bert", {FULL}),
        ("GPTNeoX", {FULL, HALVES}),
        ("GPTJ", {FULL, SIDE_BY_SIDE}),
        ("GPT2", {FULL}),
    ],
)
def test_turned_heads_are_turned_back(name: str, kinds: set[str]) -> None:
    model, batch = tiny(name)
    turnables = found(name)
    assert {t.kind for t in turnables} == kinds
    other = copy.deepcopy(model)
    state = dict(model.state_dict())
    for k, turnable in enumerate(turnables):
        turn = turnable.random(generator(k))
        state = {key: turn.apply(key, value) for key, value in state.items()}
    other.load_state_dict(state)
    before = logits(model, batch)
    torch.testing.assert_close(logits(other, batch), before, rtol=1e-4, atol=1e-4)
    back = other.state_dict()
    for turn in matched_turns(turnables, model.state_dict(), back):
        back = {key: turn.apply(key, value) for key, value in back.items()}
    for key, value in model.state_dict().items():
        torch.testing.assert_close(back[key], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_a_merge_with_a_turned_and_permuted_copy_gives_the_function_back(mode: str) -> None:
    model, batch = tiny("Llama")
    graph = graph_of("Llama")
    state = graph.apply_state(graph.random_element(generator(3)), model.state_dict())
    for k, turnable in enumerate(found("Llama")):
        turn = turnable.random(generator(k))
        state = {key: turn.apply(key, value) for key, value in state.items()}
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    result = mergeid.merge(model, other, example_inputs=batch, match=mode)
    merged = copy.deepcopy(model)
    merged.load_state_dict(result.state)
    torch.testing.assert_close(logits(merged, batch), logits(model, batch), rtol=1e-4, atol=1e-4)
    said = result.plan.to_json()["turns"]
    assert sum(turn["turned"] for turn in said) == sum(turn["heads"] for turn in said) > 0


def test_files_are_turned_as_modules_are(tmp_path: Path) -> None:
    model, batch = tiny("Llama")
    other, _ = tiny("Llama", 1)
    for name, net in (("a", model), ("b", other)):
        net.save_pretrained(tmp_path / name)
    result = mergeid.align(tmp_path / "b", to=tmp_path / "a", match="always", output=tmp_path / "aligned")
    assert result.plan.turns
    import transformers

    aligned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "aligned")
    torch.testing.assert_close(logits(aligned, batch), logits(other, batch), rtol=1e-4, atol=1e-4)
    in_memory = mergeid.align(other, to=model, example_inputs=batch, match="always").state
    for key, value in aligned.state_dict().items():
        torch.testing.assert_close(value, in_memory[key])


def test_heads_that_lie_well_stay() -> None:
    model, _ = tiny("Bert")
    state = model.state_dict()
    near = {k: v + 0.05 * v.std() * torch.randn(v.shape, generator=generator(1)) for k, v in state.items()}
    turnables = found("Bert")
    assert not matched_turns(turnables, state, near)
    assert not matched_turns(turnables, state, state)


@pytest.mark.parametrize("kind", [FULL, HALVES, SIDE_BY_SIDE])
def test_no_other_map_of_the_group_is_nearer(kind: str) -> None:
    rng = np.random.default_rng(0)
    cross = rng.normal(size=(6, 6))
    best = nearest(kind, cross)
    assert np.allclose(best @ best.T, np.eye(6))
    others = [nearest(kind, rng.normal(size=(6, 6))) for _ in range(200)]
    others += [nearest(kind, best + 0.1 * rng.normal(size=(6, 6))) for _ in range(200)]
    assert all((best * cross).sum() >= (other * cross).sum() for other in others)
    assert np.allclose(nearest(kind, best), best)


def test_weights_that_are_formed_on_demand_are_turned_when_they_are_used() -> None:
    from mergeid.basics.on_demand import OnDemand

    model, _ = tiny("Llama")
    state, turnables = model.state_dict(), found("Llama")
    lazy = {k: OnDemand(lambda which, v=v: v[which], v.shape, v.dtype) for k, v in state.items()}  # type: ignore[misc]
    for turnable in turnables:
        turn = turnable.random(generator(1))
        for axis in turnable.axes:
            now, later = turn.apply(axis.tensor, state[axis.tensor]), turn.apply(axis.tensor, lazy[axis.tensor])
            assert isinstance(later, OnDemand)
            assert torch.equal(later[3:9], now[3:9])
    other = {k: v.roll(1, 0) for k, v in state.items()}
    plain, formed = matched_turns(turnables, state, other), matched_turns(turnables, lazy, other)
    assert all(np.array_equal(x.matrices, y.matrices) for x, y in zip(plain, formed, strict=True))


class Recurring(nn.Module):
    """One layer of attention, run `times` times under as many names."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.MultiheadAttention(8, 2, bias=False, batch_first=True)] * times)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, x, x, need_weights=False)[0]
        return self.head(x)


@pytest.mark.parametrize("times", [1, 3])
def test_a_layer_of_several_names_is_turned_under_all_of_them(times: int) -> None:
    model = seeded(lambda: Recurring(times)).float()
    inputs = torch.randn(2, 5, 8, generator=generator())
    graph = mergeid.graph(model, inputs)
    turnables = find_turns(graph, model, inputs, lambda m, x: m(x), generator=generator())
    assert {t.kind for t in turnables} == {FULL} and len(turnables) == 2  # queries with keys; values
    state = dict(model.state_dict())
    for k, turnable in enumerate(turnables):
        turn = turnable.random(generator(k))
        state = {key: turn.apply(key, value) for key, value in state.items()}
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    assert not torch.allclose(other.layers[0].in_proj_weight, model.layers[0].in_proj_weight, atol=0.1)
    torch.testing.assert_close(other(inputs), model(inputs), rtol=1e-4, atol=1e-4)
