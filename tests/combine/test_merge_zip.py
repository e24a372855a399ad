"""ZipIt!: a network zipped with itself is itself, twins within a model are merged without loss, and a zip up to a layer
leaves two heads. And OT fusion of different widths, where neurons that were split come together again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from graph_helpers import permutations_of, seeded, traced
from hypothesis import given, settings
from hypothesis import strategies as st
from test_match_symmetries import Residual
from torch import Tensor, nn

from mergeid.combine.zip import TwoHeads, joint_correlations, pairs_of, spaces_up_to, zip_models
from mergeid.errors import MergeidError
from mergeid.matchers.widths import plan, transport_widths
from mergeid.neuron_graph.neuron_graph import NeuronGraph


def forward(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return model(batch["x"])


def data(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlations(graph: NeuronGraph, a: nn.Module, b: nn.Module, x: Tensor) -> dict[str, np.ndarray]:
    def batches() -> Iterator[dict[str, Tensor]]:
        yield from ({"x": part} for part in x.split(16))

    return joint_correlations(graph, (a, b), forward, batches)


def mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for i, (n, m) in enumerate(zip(widths, widths[1:], strict=False)):
        layers += [nn.ReLU()] * (i > 0) + [nn.Linear(n, m)]
    return nn.Sequential(*layers)


def with_state(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    out = copy.deepcopy(model)
    out.load_state_dict(state)
    return out


def test_correlations_are_numpys() -> None:
    a, b = (seeded(lambda: mlp(4, 6, 3), s) for s in range(2))
    x = data(40, 4)
    graph = traced(a, (x[:2],))
    (space,) = graph.spaces
    found = correlations(graph, a, b, x)[space.id]
    hidden = torch.cat([m[1](m[0](x)) for m in (a, b)], 1).detach().numpy()
    moves = hidden.std(0) > 0
    assert np.allclose(found[np.ix_(moves, moves)], np.corrcoef(hidden[:, moves].T), atol=1e-5)
    assert not found[~moves].any()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(0, 1000), st.booleans())
def test_pairs_hold_every_feature_once(n: int, seed: int, within: bool) -> None:
    rows = np.random.default_rng(seed).normal(size=(2 * n, 5))
    score = np.corrcoef(rows)
    pairs = pairs_of(score, within=within)
    assert sorted(pairs.reshape(-1).tolist()) == list(range(2 * n))
    if not within:
        assert (pairs[:, 0] < n).all() and (pairs[:, 1] >= n).all()
    best = max((score[i, j], i, j) for i in range(2 * n) for j in range(i + 1, 2 * n) if within or (i < n <= j))
    assert any(score[i, j] == pytest.approx(best[0]) for i, j in pairs)


@pytest.mark.parametrize(("make", "shape"), [(lambda: mlp(4, 7, 5, 3), (48, 4)), (Residual, (32, 2, 6, 6))])
def test_a_network_zipped_with_itself_is_itself(make: Any, shape: tuple[int, ...]) -> None:
    model, x = seeded(make), data(*shape)
    graph = traced(model, (x[:2],))
    state = dict(model.state_dict())
    zipped = zip_models(graph, (model, model), correlations(graph, model, model, x))
    for found in zipped.states:
        assert all(torch.allclose(found[k].double(), v.double(), atol=1e-12) for k, v in state.items())
    assert not any("head" in k or k.startswith("4.") for k in zipped.trunk)
    # and with its neurons in another order: the same functions on both heads
    moved = with_state(model, graph.apply_state(permutations_of(graph, 2), state))
    zipped = zip_models(graph, (model, moved), correlations(graph, model, moved, x), within=False)
    two = TwoHeads.of((model, moved), zipped)(x)
    assert all(torch.allclose(y, model(x), atol=1e-9) for y in two)


def test_twins_within_a_model_are_merged_without_loss() -> None:
    """Every hidden neuron of A twice, and of B: n merged features carry both functions exactly."""

    def twins(seed: int) -> nn.Module:
        model = seeded(lambda: mlp(4, 8, 3), seed)
        with torch.no_grad():
            model[0].weight[4:] = model[0].weight[:4]
            model[0].bias[4:] = model[0].bias[:4]
            model[0].bias += 3  # no neuron is silent
        return model

    a, b = twins(0), twins(1)
    x = data(64, 4)
    graph = traced(a, (x[:2],))
    (space,) = graph.spaces
    zipped = zip_models(graph, (a, b), correlations(graph, a, b, x))
    assert zipped.within == {space.id: 1.0}
    for y, model in zip(TwoHeads.of((a, b), zipped)(x), (a, b), strict=True):
        assert torch.allclose(y, model(x), atol=1e-9)


def test_a_zip_up_to_a_layer() -> None:
    a, b = (seeded(lambda: mlp(4, 8, 6, 5, 3), s) for s in range(2))
    x = data(64, 4)
    graph = traced(a, (x[:2],))
    found = correlations(graph, a, b, x)
    chosen = spaces_up_to(graph, a, "2")
    assert [s.size for s in graph.spaces if s.id in chosen] == [8, 6]
    zipped = zip_models(graph, (a, b), found, spaces=chosen)
    assert set(zipped.trunk) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    for state, model in zip(zipped.states, (a, b), strict=True):
        assert torch.equal(state["6.weight"], model.state_dict()["6.weight"])
        assert torch.equal(state["4.bias"], model.state_dict()["4.bias"])
    two = TwoHeads.of((a, b), zipped)
    assert two.heads[0][0].weight is two.heads[1][0].weight
    assert two.heads[0][4].weight is not two.heads[1][4].weight
    nothing = zip_models(graph, (a, b), found, spaces=())
    assert not nothing.trunk
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in nothing.states[1].items())


def test_what_cannot_be_zipped() -> None:
    a = seeded(lambda: mlp(4, 8, 6, 3))
    x = data(32, 4)
    graph = traced(a, (x[:2],))
    found = correlations(graph, a, a, x)
    last = max(graph.spaces, key=lambda s: s.axes[0].tensor)
    with pytest.raises(MergeidError, match="is zipped but reads"):
        zip_models(graph, (a, a), found, spaces={last.id})
    with pytest.raises(MergeidError, match="cannot be read"):
        zip_models(graph, (a, a), {})
    with pytest.raises(MergeidError, match="no module 'layer9'"):
        spaces_up_to(graph, a, "layer9")


def split(model: nn.Module, graph: NeuronGraph, parts: int) -> nn.Module:
    """Every hidden neuron in so many equal parts that share what reads it, in another order."""
    widths = [model[0].in_features, *(m.out_features for m in model if isinstance(m, nn.Linear))]
    wide = [widths[0], *(parts * w for w in widths[1:-1]), widths[-1]]
    out = seeded(lambda: mlp(*wide))
    last = len(model) - 1
    with torch.no_grad():
        order = torch.arange(widths[0])
        for i in range(0, len(model), 2):
            reads = model[i].weight[:, order] / (parts if i else 1)
            width = model[i].out_features
            order = torch.arange(width)
            if i < last:
                order = torch.randperm(parts * width, generator=torch.Generator().manual_seed(i)) % width
            out[i].weight.copy_(reads[order])
            out[i].bias.copy_(model[i].bias[order])
    return out


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_neurons_that_were_split_come_together(parts: int) -> None:
    a = seeded(lambda: mlp(4, 7, 5, 3))
    x = data(16, 4)
    graph = traced(a, (x[:2],))
    b = split(a, graph, parts)
    assert torch.allclose(a(x), b(x), atol=1e-9)
    found = transport_widths((graph, traced(b, (x[:2],))), (a, b), regularisation=0.005)
    for k, v in a.state_dict().items():
        assert found[k].shape == v.shape
        assert torch.allclose(found[k], v, atol=1e-3), k


def test_plan_has_uniform_masses() -> None:
    found = plan(data(4, 6), 500)
    assert torch.allclose(found.sum(1), torch.full((4,), 1 / 4, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(found.sum(0), torch.full((6,), 1 / 6, dtype=torch.float64), atol=1e-9)


def test_other_layers_are_refused() -> None:
    a, b = seeded(lambda: mlp(4, 7, 3)), seeded(lambda: mlp(4, 7, 5, 3))
    graphs = tuple(traced(m, (data(2, 4),)) for m in (a, b))
    with pytest.raises(MergeidError, match="other layers"):
        transport_widths((graphs[1], graphs[0]), (b, a))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shares_within_a_model_and_number_formats(dtype: torch.dtype) -> None:
    """Features alike in pairs within each model, and in no other way."""
    a, b = (seeded(lambda: mlp(4, 6, 3), s).to(dtype) for s in range(2))
    graph = traced(a, (torch.randn(2, 4, dtype=dtype),))
    (space,) = graph.spaces
    twins = np.kron(np.eye(6), np.ones((2, 2)))
    inside = zip_models(graph, (a, b), {space.id: twins})
    across = zip_models(graph, (a, b), {space.id: twins}, within=False)
    assert inside.within == {space.id: 1.0} and across.within == {space.id: 0.0}
    for zipped in (inside, across):
        assert all(v.dtype == dtype for state in zipped.states for v in state.values())
