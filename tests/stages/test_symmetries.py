"""Signs and orthogonal maps of residual streams, scales of units: found, proven, planted ones undone by the verbs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from graph_helpers import seeded
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import mergeid
from mergeid.neuron_graph.neuron_graph import NeuronGraph
from mergeid.neuron_graph.powers import find_powers
from mergeid.neuron_graph.scaled import Powers


def generator(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def llama(tied: bool = False, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        vocab_size=96,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config).eval().float()
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.copy_(0.5 + torch.rand(weight.shape))
    return model, {"input_ids": torch.randint(3, 90, (2, 7), generator=generator())}


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    import transformers

    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=16)
    model = seeded(lambda: transformers.GPT2LMHeadModel(config)).float()
    return model, {"input_ids": torch.randint(3, 90, (2, 7), generator=generator())}


def outputs(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        return forward(model, batch)


def forward(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).logits if isinstance(batch, dict) else model(batch)


def with_state(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    return other


def powers_of(model: nn.Module, batch: Any) -> tuple[NeuronGraph, Powers]:
    graph = mergeid.graph(model, batch)
    ids = [s.id for s in graph.spaces if not s.parents and len(s.axes) > 1]
    return graph, find_powers(graph, model, batch, forward, generator=generator(), only=ids)


def rescaled(model: nn.Module, batch: Any, seed: int = 1, size: float = 1.0) -> tuple[nn.Module, int]:
    """A copy with other positive scales, and of how many kinds they are."""
    state, found = dict(model.state_dict()), powers_of(model, batch)[1].scaled
    for k, one in enumerate(found):
        factors = torch.randn(one.size, generator=generator(seed + k), dtype=torch.float64).mul(size).exp()
        turn = one.scale(factors.numpy())
        state = {key: turn.apply(key, value) for key, value in state.items()}
    return with_state(model, state), len(found)


def flipped(model: nn.Module, neurons: list[int]) -> nn.Module:
    """A Llama with signs of its residual stream changed, by hand."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for name, value in state.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            value[neurons] *= -1
        elif "norm" not in name:
            value[:, neurons] *= -1
    return with_state(model, state)


def rotated(model: nn.Module, seed: int = 5) -> nn.Module:
    """A Llama with its gains folded and its residual stream rotated, by hand; the last gain stays where the head is
    tied."""
    q = torch.linalg.qr(torch.randn(32, 32, generator=generator(seed), dtype=torch.float64))[0]
    state = {k: v.double() for k, v in model.state_dict().items()}
    tied = bool(model.config.tie_word_embeddings)

    def gain(name: str) -> Tensor:
        found = state[name].clone()
        state[name] = torch.ones_like(found)
        return found

    for layer in range(model.config.num_hidden_layers):
        at = f"model.layers.{layer}."
        before, behind = gain(f"{at}input_layernorm.weight"), gain(f"{at}post_attention_layernorm.weight")
        for part in ("q", "k", "v"):
            state[f"{at}self_attn.{part}_proj.weight"] = state[f"{at}self_attn.{part}_proj.weight"] * before @ q.T
        for part in ("gate", "up"):
            state[f"{at}mlp.{part}_proj.weight"] = state[f"{at}mlp.{part}_proj.weight"] * behind @ q.T
        for part in ("self_attn.o", "mlp.down"):
            state[f"{at}{part}_proj.weight"] = q @ state[f"{at}{part}_proj.weight"]
    if not tied:
        state["lm_head.weight"] = state["lm_head.weight"] * gain("model.norm.weight") @ q.T
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"] @ q.T
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return with_state(model, {k: v.float() for k, v in state.items()})


def assert_merges_back(model: nn.Module, other: nn.Module, batch: Any, **asked: Any) -> mergeid.MergeResult:
    """Both are one function, and so is their merge."""
    before = outputs(model, batch)
    scale = float(before.abs().max())
    torch.testing.assert_close(outputs(other, batch), before, rtol=0, atol=1e-4 * scale)
    result = mergeid.merge(model, other, example_inputs=batch, **asked)
    merged = with_state(model, result.state)
    torch.testing.assert_close(outputs(merged, batch), before, rtol=0, atol=1e-4 * scale)
    return result


def said(result: mergeid.MergeResult) -> set[str]:
    return {found["kind"] for found in result.plan.to_json()["maps"] if found["changed"]}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", ["auto", "always"])
def test_flipped_signs_of_a_llama_are_undone(tied: bool, mode: str) -> None:
    model, batch = llama(tied)
    result = assert_merges_back(model, flipped(model, [0, 3, 17, 30]), batch, match=mode)
    assert said(result) == {"signs"}
    assert any("signs of 4 of 32 neurons" in note for note in result.notes)


@pytest.mark.parametrize("tied", [False, True])
def test_a_rotated_llama_is_turned_back(tied: bool) -> None:
    model, batch = llama(tied)
    if tied:  # what a tied head reads cannot be folded: only where it does not differ is a rotation a symmetry
        model.model.norm.weight.data.fill_(0.7)
    result = assert_merges_back(model, rotated(model), batch)
    assert said(result) == {"orthogonal, gains folded"}
    assert any("rotated onto A's" in note for note in result.notes)
    kept = dict(model.named_parameters())["model.layers.0.input_layernorm.weight"]
    torch.testing.assert_close(result.state["model.layers.0.input_layernorm.weight"], kept.detach())


@pytest.mark.parametrize("first", ["a", "b"])
def test_a_tied_llama_meets_its_rotated_copy(tmp_path: Any, first: str) -> None:
    """Behind a last gain that differs from neuron to neuron the copy's head cannot be tied, and the result's is not."""
    import transformers

    model, batch = llama(True)
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    untied = transformers.LlamaForCausalLM(config).eval()
    untied.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    other = rotated(untied)
    torch.testing.assert_close(outputs(other, batch), outputs(model, batch), rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path / "a")
    other.save_pretrained(tmp_path / "b")
    result = mergeid.merge(tmp_path / first, tmp_path / ("b" if first == "a" else "a"), output=tmp_path / "m")
    assert said(result) == {"orthogonal, gains folded"}
    assert any("the result has a separate head" in note for note in result.notes)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(outputs(merged, batch), outputs(model, batch), rtol=0, atol=1e-5)


def test_everything_at_once() -> None:
    model, batch = llama()
    other = flipped(model, [1, 2])
    other, kinds = rescaled(other, batch)
    assert kinds == 7  # five gains, two gated layers
    graph = mergeid.graph(model, batch)
    other = with_state(model, graph.apply_state(graph.random_element(generator(3)), other.state_dict()))
    result = assert_merges_back(model, other, batch)
    assert said(result) >= {"signs", "positive scales"}


def test_rotated_and_rescaled_and_permuted() -> None:
    model, batch = llama()
    other = rescaled(rotated(model), batch)[0]
    graph = mergeid.graph(model, batch)
    other = with_state(model, graph.apply_state(graph.random_element(generator(3)), other.state_dict()))
    result = assert_merges_back(model, other, batch)
    assert said(result) == {"orthogonal, gains folded", "positive scales"}


class Gated(nn.Module):
    """A gated unit in one fused projection."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(6, 32), nn.Linear(16, 5), act

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(self.act(gate) * up)


class Residual(nn.Module):
    """Convolutions without norms around a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.head = nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.b(self.norm(self.a(x)).relu())).relu()
        return self.head(x.flatten(1))


def mlp(act: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 24), act(), nn.Linear(24, 20), act(), nn.Linear(20, 4))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "relu": (lambda: mlp(nn.ReLU), (16, 6), 2),
    "leaky": (lambda: mlp(nn.LeakyReLU), (16, 6), 2),
    "gelu": (lambda: mlp(nn.GELU), (16, 6), 0),
    "gated": (Gated, (16, 6), 1),
    "bilinear": (lambda: Gated(lambda x: x), (16, 6), 2),
    "residual": (Residual, (2, 3, 6, 6), 2),
}


@pytest.mark.parametrize("name", NETS)
def test_scales_of_units_are_undone(name: str) -> None:
    make, shape, kinds = NETS[name]
    model = seeded(make).float()
    x = torch.randn(shape, generator=generator())
    other, found = rescaled(model, x)
    assert found == kinds
    graph = mergeid.graph(model, x)
    other = with_state(model, graph.apply_state(graph.random_element(generator(3)), other.state_dict()))
    result = assert_merges_back(model, other, x)
    assert said(result) == ({"positive scales"} if kinds else set())


def test_files_are_rescaled_as_modules_are(tmp_path: Any) -> None:
    model, batch = llama()
    other = flipped(rescaled(model, batch)[0], [4, 5])
    for name, net in (("a", model), ("b", other)):
        net.save_pretrained(tmp_path / name)
    mergeid.merge(tmp_path / "a", tmp_path / "b", output=tmp_path / "m")
    import transformers

    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(outputs(merged, batch), outputs(model, batch), rtol=1e-4, atol=1e-4)
    mergeid.align(tmp_path / "b", to=tmp_path / "a", output=tmp_path / "aligned")
    aligned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "aligned")
    for key, value in aligned.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_a_scrambled_copy_with_random_maps_is_merged_back(tmp_path: Any, tied: bool) -> None:
    import transformers

    model, batch = llama(tied)
    model.save_pretrained(tmp_path / "a")
    result = mergeid.scramble(tmp_path / "a", output=tmp_path / "b", maps=True, seed=3)
    assert result.max_relative_error < 1e-6
    mergeid.merge(tmp_path / "a", tmp_path / "b", output=tmp_path / "m")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(outputs(merged, batch), outputs(model, batch), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [0.02, 0.2])
def test_small_scales_are_seen_in_files_too(tmp_path: Any, size: float) -> None:
    model = seeded(NETS["relu"][0]).float()
    x = torch.randn(16, 6, generator=generator())
    result = assert_merges_back(model, rescaled(model, x, size=size)[0], x)
    assert said(result) == {"positive scales"}
    net, batch = llama()
    other = rescaled(net, batch, size=size)[0]
    for name, one in (("a", net), ("b", other)):
        one.save_pretrained(tmp_path / name)
    result = mergeid.merge(tmp_path / "a", tmp_path / "b", output=tmp_path / "m")
    assert result.plan is not None
    assert said(result) == {"positive scales"}


def test_ordinary_pairs_are_left_alone() -> None:
    for make, shape in ((NETS["relu"][0], (16, 6)), (NETS["residual"][0], (2, 3, 6, 6))):
        model, other = (seeded(make, s).float() for s in (0, 1))
        x = torch.randn(shape, generator=generator())
        assert not mergeid.merge(model, other, example_inputs=x, match="always").plan.to_json()["maps"]
    make, x = lambda: nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3)), torch.randn(16, 6)
    for seed in range(6):  # few neurons: chance brings lengths nearer
        model = seeded(make, seed).float()
        noise = generator(seed)
        near = {k: v + 0.02 * torch.randn(v.shape, generator=noise) for k, v in model.state_dict().items()}
        assert not mergeid.merge(model, with_state(model, near), example_inputs=x).plan.to_json()["maps"]
    (model, batch), (other, _) = llama(), llama(seed=1)
    assert not mergeid.merge(model, other, example_inputs=batch, match="always").plan.to_json()["maps"]


def test_no_sign_and_no_rotation_under_layer_norm() -> None:
    model, batch = gpt2()
    _, powers = powers_of(model, batch)
    assert not powers.streams
    # gains and biases of LayerNorm against their readers
    assert all({p for _, p in one.powers} == {1, -1} for one in powers.scaled)


def test_powers_hold_and_others_do_not() -> None:
    model, batch = llama()
    graph, powers = powers_of(model, batch)
    before = outputs(copy.deepcopy(model).double(), batch)
    for one in powers.scaled:
        turn = one.scale(np.exp(np.random.default_rng(0).normal(size=one.size)))
        state = {k: turn.apply(k, v.double()) for k, v in model.state_dict().items()}
        torch.testing.assert_close(outputs(with_state(copy.deepcopy(model).double(), state), batch), before)
    assert graph.by_id[powers.streams[0].space].size == 32
