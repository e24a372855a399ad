"""Scalings of neurons and rotations of residual streams: the function stays, what was planted is found again."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from graph_helpers import seeded, traced
from tiny_transformers import configs
from torch import Tensor, nn

from mergeid.errors import MergeidError
from mergeid.matchers.orthogonal import (
    absorb_gains,
    aligned_orthogonally,
    find_streams,
    procrustes,
    random_orthogonal,
    rotated,
)
from mergeid.matchers.scaling import find_scalings, match_scaling, matched_scalings, scaled
from mergeid.matchers.sides import side
from mergeid.neuron_graph.neuron_graph import NeuronGraph


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def forward(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, dict) else model(batch)


class Residual(nn.Module):
    def __init__(self, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), act())
        self.block = nn.Sequential(
            nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), act(), nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)
        )
        self.act = act()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.act(x + self.block(x))
        return self.head(x.mean((2, 3)))


def mlp(act: type[nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 7), act(), nn.Linear(7, 5), act(), nn.Linear(5, 3))


def outputs(model: nn.Module, state: dict[str, Tensor], batch: Any) -> Tensor:
    probe = copy.deepcopy(model)
    probe.load_state_dict(state)
    with torch.no_grad():
        found = forward(probe, batch)
    return found if isinstance(found, Tensor) else found[0]


@pytest.mark.parametrize(("make", "shape", "count"), [(mlp, (3, 4), 2), (Residual, (2, 2, 6, 6), 2)])
def test_scalings_are_found_and_planted_ones_come_back(make: Any, shape: tuple[int, ...], count: int) -> None:
    model, batch = seeded(make), torch.randn(shape, dtype=torch.float64, generator=generator())
    graph = traced(model, (batch,))
    scalings = find_scalings(graph, model, forward, batch, generator=generator())
    assert len(scalings) == len(graph.spaces) == count
    state = dict(model.state_dict())
    moved, planted = state, {}
    rng = np.random.default_rng(0)
    for s in scalings:
        planted[s.space] = np.exp(rng.uniform(-1, 1, graph.by_id[s.space].size))
        moved = scaled(moved, s, planted[s.space])
    assert any(not torch.allclose(moved[k], state[k]) for k in state)
    assert torch.allclose(outputs(model, moved, batch), outputs(model, state, batch), rtol=1e-9, atol=1e-12)
    back = matched_scalings(scalings, state, moved)
    for k, v in state.items():
        assert torch.allclose(back[k], v, rtol=1e-6, atol=1e-9), k
    alone = scaled(state, scalings[0], planted[scalings[0].space])
    assert np.allclose(match_scaling(scalings[0], state, alone), 1 / planted[scalings[0].space])


def test_units_that_are_not_homogeneous_do_not_scale() -> None:
    for make, shape in ((lambda: mlp(nn.GELU), (3, 4)), (lambda: Residual(nn.SiLU), (2, 2, 6, 6))):
        model, batch = seeded(make), torch.randn(shape, dtype=torch.float64, generator=generator())
        assert not find_scalings(traced(model, (batch,)), model, forward, batch, generator=generator())


def llama(**changed: Any) -> tuple[nn.Module, NeuronGraph, dict[str, Tensor]]:
    import transformers

    config = dict(configs()["LlamaForCausalLM"])
    kind = config.pop("model_type")
    config.pop("architectures")
    built = transformers.AutoConfig.for_model(kind, **{**config, **changed}, tie_word_embeddings=False)
    model = seeded(lambda: transformers.LlamaForCausalLM(built))
    batch = {"input_ids": torch.randint(3, 90, (2, 7), generator=generator())}
    return model, traced(model, batch, lambda m, x: m(**x).logits), batch


def test_gated_units_and_values_scale() -> None:
    model, graph, batch = llama(num_key_value_heads=4)
    scalings = find_scalings(graph, model, lambda m, x: m(**x).logits, batch, generator=generator())
    read = {axis.tensor for s in scalings for axis, exponent in s.axes if exponent < 0}
    for layer in range(2):
        assert f"model.layers.{layer}.mlp.down_proj.weight" in read
        assert f"model.layers.{layer}.self_attn.o_proj.weight" in read
    assert not any("gate_proj" in axis.tensor for s in scalings for axis, _ in s.axes)


def test_a_residual_stream_rotates_and_the_rotation_is_found() -> None:
    model, graph, batch = llama()

    def logits(m: nn.Module, x: Any) -> Tensor:
        return m(**x).logits

    before = logits(model, batch).detach()
    assert not find_streams(graph, model, logits, batch, generator=generator())
    state = absorb_gains(model, logits, batch)
    gains = [k for k in state if "norm" in k]
    assert len(gains) == 5
    assert all((state[k] == 1).all() for k in gains)
    plain = copy.deepcopy(model)
    plain.load_state_dict(state)
    assert torch.allclose(logits(plain, batch), before, rtol=1e-5, atol=1e-6)  # the norms compute in float32
    (stream,) = find_streams(graph, plain, logits, batch, generator=generator())
    assert stream.size == 32
    q = random_orthogonal(32, generator(5))
    assert torch.allclose(q @ q.T, torch.eye(32, dtype=torch.float64))
    moved = rotated(state, stream, q)
    assert not torch.allclose(moved["lm_head.weight"], state["lm_head.weight"])
    plain.load_state_dict(moved)
    assert torch.allclose(logits(plain, batch), before, rtol=1e-5, atol=1e-6)  # the norms compute in float32
    assert torch.allclose(procrustes(graph, stream, state, moved), q.T, atol=1e-9)
    others = [s.id for s in graph.spaces if s.id != stream.space]
    element = graph.random_element(generator(6), only=others)
    both = graph.apply_state(element, moved)
    back = aligned_orthogonally(graph, stream, state, both, generator=generator())
    assert all(torch.allclose(back[k], v, atol=1e-6) for k, v in state.items())


def test_rotation_is_found_under_noise() -> None:
    model, graph, batch = llama()

    def logits(m: nn.Module, x: Any) -> Tensor:
        return m(**x).logits

    state = absorb_gains(model, logits, batch)
    plain = copy.deepcopy(model)
    plain.load_state_dict(state)
    (stream,) = find_streams(graph, plain, logits, batch, generator=generator())
    g = generator(7)
    near = {k: v + 0.1 * v.norm() / v.numel() ** 0.5 * torch.randn(v.shape, generator=g) for k, v in state.items()}
    q = random_orthogonal(32, g)
    back = aligned_orthogonally(graph, stream, state, rotated(near, stream, q), generator=generator())

    def distance(x: dict[str, Tensor]) -> float:
        return sum(float((x[k] - state[k]).square().sum()) for k in state)

    assert distance(back) <= distance(near) * (1 + 1e-9)


def test_layernorm_streams_do_not_rotate() -> None:
    norm = seeded(lambda: nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 2)))
    batch = torch.randn(4, 3, dtype=torch.float64, generator=generator())
    assert not find_streams(traced(norm, (batch,)), norm, forward, batch, generator=generator())
    root = seeded(lambda: nn.Sequential(nn.Linear(3, 6), nn.RMSNorm(6, elementwise_affine=False), nn.Linear(6, 2)))
    assert len(find_streams(traced(root, (batch,)), root, forward, batch, generator=generator())) == 1


def test_sides() -> None:
    model = seeded(lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3), nn.ReLU(), nn.Conv1d(6, 2, 3)))
    graph = traced(model, (torch.randn(1, 4, 9, dtype=torch.float64),))
    assert [side(graph, model, "0.weight", d) for d in (0, 1)] == ["in", "out"]
    assert [side(graph, model, "2.weight", d) for d in (0, 1)] == ["out", "in"]
    assert side(graph, model, "0.bias", 0) == "out"

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    own = seeded(lambda: nn.Sequential(nn.Linear(2, 3), nn.ReLU(), Own()))
    graph = traced(own, (torch.randn(4, 2, dtype=torch.float64),))
    assert side(graph, own, "2.weight", 0) == "in"
    with pytest.raises(MergeidError, match=r"axis 1 of '2.weight' in a Own"):
        side(graph, own, "2.weight", 1)
