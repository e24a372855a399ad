"""A permuted copy comes back exactly, also where spaces must move together, and where neurons are alike."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
import torch
from graph_helpers import seeded, traced
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as f

import mergeid
import mergeid.matchers.copies as copies
from mergeid.evidence.decide_weights import decide_from_weights
from mergeid.matchers import MatchTask, WeightSimilarity, get_matcher
from mergeid.matchers.copies import copy_order, same_numbers
from mergeid.neuron_graph.neuron_graph import NeuronGraph

State = dict[str, Tensor]


class SharedNorm(nn.Module):
    """Attention whose queries and keys are normed by one gain for all heads, which ties their dimensions together."""

    def __init__(self, heads: int = 4, width: int = 8) -> None:
        super().__init__()
        self.shape = (heads, width)
        self.read = nn.Linear(6, 16)
        self.q, self.k, self.v = (nn.Linear(16, heads * width, bias=False) for _ in range(3))
        self.gain = nn.Parameter(torch.ones(width))
        self.out = nn.Linear(heads * width, 16)
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.read(x)
        q, k, v = (m(h).unflatten(-1, self.shape).transpose(1, 2) for m in (self.q, self.k, self.v))
        q = f.rms_norm(q, self.shape[1:]) * self.gain
        mixed = (q @ f.rms_norm(k, self.shape[1:]).transpose(-1, -2)).softmax(-1) @ v
        return self.last(h + self.out(mixed.transpose(1, 2).flatten(2)))


class Capsules(nn.Module):
    """Every capsule routes to every other: spaces that meet in one tensor of four axes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.w = nn.Parameter(torch.randn(4, 3, 2, 5))

    def forward(self, x: Tensor) -> Tensor:
        told = torch.einsum("bid,ijde->bije", self.a(x).view(len(x), 4, 2), self.w)
        share = told.new_zeros(len(x), 4, 3)
        for _ in range(2):
            out = (share.softmax(-1)[..., None] * told).sum(1)
            share = share + (told * out[:, None]).sum(-1)
        return out.norm(dim=-1)


class Recurrent(nn.Module):
    """Neurons on both axes of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.again, self.out = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.read(x).tanh()
        for _ in range(2):
            h = self.again(h).tanh()
        return self.out(h)


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 3))


KINDS = {
    "shared norm": (SharedNorm, (2, 5, 6)),
    "capsules": (Capsules, (4, 6)),
    "recurrent": (Recurrent, (4, 3)),
    "layers": (layers, (4, 4)),
}


@pytest.fixture(scope="module")
def networks() -> dict[str, tuple[NeuronGraph, State]]:
    out = {}
    for name, (make, shape) in KINDS.items():
        model = seeded(make)
        example = torch.randn(shape, dtype=next(model.parameters()).dtype)
        out[name] = (traced(model, (example,)), {k: v.detach() for k, v in model.state_dict().items()})
    return out


def weights_of(state: State, seed: int, values: int, ones: bool) -> State:
    """Weights of that many values (0: all differ). `ones`: vectors are ones, as the gains of new norms are."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for k, v in state.items():
        drawn = torch.randn(v.shape, generator=generator, dtype=v.dtype)
        if values:
            drawn = torch.randint(values, v.shape, generator=generator).to(v.dtype)
        made[k] = torch.ones_like(v) if ones and v.dim() == 1 else drawn
    return made


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(KINDS)), st.integers(0, 10**6), st.sampled_from([0, 1, 2, 3]), st.booleans(), st.booleans()
)
def test_a_scrambled_copy_comes_back_number_for_number(networks, kind, seed, values, ones, half) -> None:  # type: ignore[no-untyped-def]
    graph, state = networks[kind]
    a = weights_of(state, seed, values, ones)
    if half:
        a = {k: v.bfloat16() for k, v in a.items()}
    b = graph.apply_state(graph.random_element(torch.Generator().manual_seed(seed + 1)), a)
    similarity = WeightSimilarity(graph, a, b)
    elements = [
        decide_from_weights(similarity, generator=torch.Generator().manual_seed(0)).element,
        get_matcher("weight").match(MatchTask(graph, a, b, torch.Generator().manual_seed(0))),
    ]
    for element in elements:
        assert graph.contains(element)
        back = graph.apply_state(element, b)
        assert all(torch.equal(back[k], a[k]) for k in a)


def test_all_at_once_is_taken_back_where_it_is_wrong(networks) -> None:  # type: ignore[no-untyped-def]
    """Neurons in a ring have one colour, and few of their orders keep the ring."""
    graph, state = networks["recurrent"]
    ring = torch.eye(6, dtype=torch.float64)[torch.arange(6).roll(1)]
    a = {k: ring if v.shape == ring.shape else torch.ones_like(v) for k, v in state.items()}
    for seed in range(10):
        b = graph.apply_state(graph.random_element(torch.Generator().manual_seed(seed)), a)
        found = copy_order(graph, a, b)
        assert found is not None
        assert torch.equal(graph.apply(found, "again.weight", b["again.weight"]), ring)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_a_copy_is_found_exactly_where_one_of_all_orders_is_one(seed: int) -> None:
    """Against all orders of two layers of three neurons, with numbers of two values in shuffled places."""
    model = seeded(lambda: nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 3, bias=False), nn.ReLU()))
    model.append(nn.Linear(3, 1, bias=False).double())
    graph = traced(model, (torch.randn(2, 1, dtype=torch.float64),))
    generator = torch.Generator().manual_seed(seed)
    a = {k: torch.randint(2, v.shape, generator=generator).double() for k, v in model.state_dict().items()}
    b = {k: v.flatten()[torch.randperm(v.numel(), generator=generator)].view(v.shape) for k, v in a.items()}
    assert same_numbers(graph, a, b)
    orders = [np.array(p) for p in permutations(range(3))]
    ids = [s.id for s in graph.spaces]
    assert [s.size for s in graph.spaces] == [3, 3]
    elements = (dict(zip(ids, choice, strict=True)) for choice in product(orders, repeat=2))
    exists = any(all(torch.equal(graph.apply(e, k, b[k]), a[k]) for k in a) for e in elements)
    found = copy_order(graph, a, b)
    assert (found is not None) == exists
    if found is not None:
        assert all(torch.equal(graph.apply(found, k, b[k]), a[k]) for k in a)


def test_alike_neurons_stay_where_they_are(networks) -> None:  # type: ignore[no-untyped-def]
    for graph, state in networks.values():
        a = {k: torch.ones_like(v) for k, v in state.items()}
        found = copy_order(graph, a, a)
        assert found is not None
        assert all(np.array_equal(found[k], order) for k, order in graph.identity().items())


def test_another_model_is_no_copy(networks) -> None:  # type: ignore[no-untyped-def]
    for graph, state in networks.values():
        other = {k: v.clone() for k, v in state.items()}
        other[max(graph.on_tensor)].view(-1)[0] += 1e-12
        assert copy_order(graph, state, other) is None


def copied(graph: mergeid.NeuronGraph, model: nn.Module, make: type[nn.Module]) -> nn.Module:
    other = make()
    order = graph.random_element(torch.Generator().manual_seed(9))
    other.load_state_dict(graph.apply_state(order, {k: v.clone() for k, v in model.state_dict().items()}))
    return other


@pytest.mark.parametrize(("make", "shape"), [(SharedNorm, (2, 5, 6)), (Capsules, (4, 6))])
@pytest.mark.parametrize("match", ["auto", "always"])
@pytest.mark.parametrize("examples", [0, 32])
def test_merging_with_a_copy_gives_the_model_back(
    make: type[nn.Module], shape: tuple[int, ...], match: str, examples: int
) -> None:
    torch.manual_seed(1)
    model, example = make().eval(), torch.randn(shape)
    other = copied(mergeid.graph(model, example), model, make)
    data = [torch.randn(shape[1:]) for _ in range(examples)] or None
    merged = mergeid.merge(model, other, example_inputs=example, match=match, data=data)
    for k, v in model.state_dict().items():
        torch.testing.assert_close(merged.state[k], v, rtol=0, atol=1e-6)


def test_a_copy_that_does_not_come_back_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "LEAST_WORK", 0)
    monkeypatch.setattr(copies, "PASSES", 0)
    monkeypatch.setattr("mergeid.matchers.weight.layerwise_matching", lambda similar: similar.graph.identity())
    seen = set()
    for seed in range(6):
        torch.manual_seed(seed)
        model, example = Capsules().eval(), torch.randn(4, 6)
        other = copied(mergeid.graph(model, example), model, Capsules)
        plan = mergeid.plan(model, other, example_inputs=example, match="always")
        back = plan.graph.apply_state(plan.element, other.state_dict())
        off = any(not torch.equal(back[k], v) for k, v in model.state_dict().items())
        assert off == any("so the merge is not A" in note for note in plan.notes)
        seen.add(off)
    assert True in seen


@pytest.mark.parametrize("spread", [1e-3, 0.02, 0.2])
def test_what_lies_in_neurons_counts_for_them(networks, spread: float) -> None:  # type: ignore[no-untyped-def]
    """Gains of nearly one say little of the order that they share with the rows of all heads; no copies here."""
    graph, state = networks["shared norm"]
    generator = torch.Generator().manual_seed(0)
    a = weights_of(state, 0, 0, ones=False)
    a["gain"] = 1 + spread * torch.randn(8, generator=generator, dtype=torch.float64)
    noisy = {k: v + 1e-4 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in a.items()}
    for seed in range(3):
        b = graph.apply_state(graph.random_element(torch.Generator().manual_seed(seed)), noisy)
        element = decide_from_weights(WeightSimilarity(graph, a, b), generator=torch.Generator().manual_seed(0)).element
        back = graph.apply_state(element, b)
        assert all(torch.allclose(back[k], noisy[k], rtol=0, atol=0) for k in a)
