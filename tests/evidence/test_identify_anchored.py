"""Certificates that know what they say: how firmly fixed parts hold neurons, and the chain from the inputs on."""

from __future__ import annotations

import copy
from itertools import permutations, product
from math import acos, degrees

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (  # fmt: skip
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import mergeid
from mergeid import nn as mnn
from mergeid.evidence.anchored import IDENTIFIED, IF_INPUTS, NOT, Certificate
from mergeid.evidence.entries import entries
from mergeid.evidence.hold import WIDEST, Fixed, hold
from mergeid.evidence.writers import Writer
from mergeid.neuron_graph.neuron_graph import AxisMap, Space
from mergeid.stages.open import Pair
from mergeid.stages.structure import certified
from mergeid.verbs.load import load


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- how firmly ---------------------------------------------------------------------------------------------


def one_space(n: int, blocks: int = 1) -> tuple[Space, Writer]:
    axis = AxisMap("w", 0, np.arange(n))
    space = Space("s", "s", n, blocks, (), np.zeros((blocks, 0), np.int64), (axis,))
    return space, Writer("w", axis, frozenset(), None)


def fixed_of(a: Tensor, b: Tensor, f: Tensor) -> Fixed:
    """Two networks that store F and D = 1, by their effective weights."""
    one, two = {"w": a - f, "w_fixed": f}, {"w": b - f, "w_fixed": f}
    return Fixed(lambda _, n: one.get(n), lambda _, n: two.get(n))


def drawn(n: int, d: int, share: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    f, a, b = (torch.randn(n, d, generator=seeded(seed + k), dtype=torch.float64) for k in range(3))
    return f + share * a, f + share * b, f


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.integers(2, 9), st.floats(0, 3), st.integers(0, 10**6), st.integers(1, 2))
def test_held_firmly_by_brute_force(n: int, d: int, share: float, seed: int, blocks: int) -> None:
    n *= blocks
    a, b, f = drawn(n, d, share, seed)
    space, writer = one_space(n, blocks)
    found = hold(fixed_of(a, b, f), space, [writer])
    m = n // blocks
    widest = []
    for w in (a, b):
        angles = [
            degrees(acos(max(-1.0, min(1.0, float((dw @ df) / (dw.norm() * df.norm()))))))
            for i in range(n)
            for j in range(n)
            if i != j and i // m == j // m
            for dw, df in [(w[i] - w[j], f[i] - f[j])]
        ]
        widest.append(max(angles))
    assert [found.angle_a, found.angle_b] == pytest.approx(widest, abs=1e-3)
    if not found.firm:
        return
    # no order is as cheap in either network's classes, and none brings B as near to A
    orders = [
        np.concatenate(parts)
        for parts in product(*[[np.array(p) + k * m for p in permutations(range(m))] for k in range(blocks)])
    ]
    for order in orders:
        if (order == np.arange(n)).all():
            continue
        for one, two in ((f, a), (f, b), (a, b)):
            assert (one - two[order]).square().sum() > (one - two).square().sum()


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(2, 20), st.floats(0, 2), st.integers(0, 10**6))
def test_below_45_degrees_no_swap_brings_the_networks_nearer(n: int, d: int, share: float, seed: int) -> None:
    a, b, f = drawn(n, d, share, seed)
    space, writer = one_space(n)
    found = hold(fixed_of(a, b, f), space, [writer])
    if max(found.angle_a, found.angle_b) < WIDEST:
        inner = (a[:, None] - a[None]).mul(b[:, None] - b[None]).sum(-1)
        assert bool((inner[~torch.eye(n, dtype=torch.bool)] > 0).all())


def test_several_writers_are_rows_side_by_side_and_free_ones_weigh_too() -> None:
    a, b, f = drawn(6, 20, 0.4, 3)
    space, writer = one_space(6)
    whole = hold(fixed_of(a, b, f), space, [writer])
    cut = {"x": slice(8), "y": slice(8, 20)}
    states = [{f"{n}{end}": v[:, c] for n, c in cut.items() for end, v in (("", w - f), ("_fixed", f))} for w in (a, b)]
    parts = [Writer(n, writer.axis, frozenset(), None) for n in ("x", "y")]
    found = hold(Fixed(lambda _, n: states[0].get(n), lambda _, n: states[1].get(n)), space, parts)
    assert found.angle_a == pytest.approx(whole.angle_a) and found.names == ("x", "y")
    # the same rows without a fixed part are only more that was trained
    for state in states:
        state["y"] = state["y"] + state.pop("y_fixed")
    loose = hold(Fixed(lambda _, n: states[0].get(n), lambda _, n: states[1].get(n)), space, parts)
    assert loose.names == ("x",) and loose.angle_a > found.angle_a
    # and what differs between the models, or is not there at all, is no fixed part
    states[1]["x_fixed"] = states[1]["x_fixed"] + 1
    assert not hold(Fixed(lambda _, n: states[0].get(n), lambda _, n: states[1].get(n)), space, parts).firm


def test_weights_that_are_not_finite_hold_nothing() -> None:
    a, b, f = drawn(6, 20, 0.1, 3)
    space, writer = one_space(6)
    assert hold(fixed_of(a, b, f), space, [writer]).firm
    a[2, 3] = torch.nan
    assert not hold(fixed_of(a, b, f), space, [writer]).firm


# -- the chain ----------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Embedding, two blocks that read and write a stream, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(40, 32)
        self.up = nn.ModuleList(nn.Linear(32, 24) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(24, 32) for _ in range(2))
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        return self.head(x)


class Gated(nn.Module):
    """Channels whose order an efficient channel attention freezes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.mix = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.next = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = self.mix(x.mean((2, 3))[:, None])[:, 0]
        return self.head(torch.relu(self.next(x * gate.sigmoid()[:, :, None, None])).mean((2, 3)))


class Deep(nn.Module):
    """Pointwise, depthwise, pointwise convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.deep, self.narrow = nn.Conv2d(3, 12, 5), nn.Conv2d(12, 12, 3, groups=12), nn.Conv2d(12, 6, 1)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.narrow(self.deep(torch.relu(self.wide(x))))).mean((2, 3)))


VECTORS, IMAGES = torch.randn(4, 40, generator=seeded(1)), torch.randn(2, 3, 8, 8, generator=seeded(1))


def pair(make, layers=None, seeds=(9, 9), sigma=1.0) -> tuple[nn.Module, nn.Module]:
    """Two networks of independent seeds; their fixed parts come from `seeds`."""
    models = []
    for seed, fixed in enumerate(seeds):
        torch.manual_seed(seed)
        model = make().eval()
        mnn.asymmetrise(model, "w", generator=seeded(fixed), layers=layers, sigma=sigma)
        models.append(model)
    return models[0], models[1]


def certify(models: tuple[nn.Module, nn.Module], x: Tensor | None = None, base: nn.Module | None = None):
    graph = mergeid.graph(models[0], x)
    a, b = (load(m, example_inputs=x) for m in models)
    return graph, certified(Pair(a, b, graph), None if base is None else dict(base.state_dict()))


def by_writer(graph, found: dict[str, Certificate], tensor: str) -> Certificate:
    return found[next(s.id for s in graph.spaces if any((x.tensor, x.axis) == (tensor, 0) for x in s.axes))]


def test_a_stream_is_anchored_by_its_embedding() -> None:
    graph, found = certify(pair(Residual), VECTORS)
    assert {c.says for c in found.values()} == {IDENTIFIED} and len(found) == 3
    for certificate in found.values():
        assert certificate.angle_a is not None and certificate.angle_a < WIDEST and "°" in certificate.why
    # everything but the embedding fixed: all are held, and nothing says that their inputs correspond
    graph, found = certify(pair(Residual, layers=["up.*", "down.*"]), VECTORS)
    stream = by_writer(graph, found, "embed.weight")
    assert {c.says for c in found.values()} == {IF_INPUTS}
    for certificate in found.values():
        assert certificate.breaks == (stream.space,)
    assert "embed.weight" in stream.gap and "residual" not in stream.gap
    # one block's hidden neurons free: they break the chain for nothing else, for the embedding holds the stream
    graph, found = certify(pair(Residual, layers=["embed", "up.0", "down.*"]), VECTORS)
    assert by_writer(graph, found, "up.1.weight").says == NOT
    assert by_writer(graph, found, "embed.weight").says == by_writer(graph, found, "up.0.weight").says == IDENTIFIED


def test_a_chain_breaks_where_a_layer_is_free() -> None:
    def make() -> nn.Module:
        sizes = [(40, 24), (24, 24), (24, 24), (24, 3)]
        layers = [m for a, b in sizes for m in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*layers[:-1])

    graph, found = certify(pair(make, layers=["0", "4"]), VECTORS)
    first, second, third = (by_writer(graph, found, f"{k}.weight") for k in (0, 2, 4))
    assert (first.says, second.says, third.says) == (IDENTIFIED, NOT, IF_INPUTS)
    assert third.breaks == second.breaks == (second.space,) and first.breaks == ()
    assert "no fixed part" in second.why and graph.by_id[second.space].label in third.why


def test_no_fixed_parts_other_ones_and_weak_ones_prove_nothing() -> None:
    plain = tuple(copy.deepcopy(Residual()) for _ in range(2))
    assert {c.says for c in certify(plain, VECTORS)[1].values()} == {NOT}
    _, found = certify(pair(Residual, seeds=(8, 9)), VECTORS)
    assert {c.says for c in found.values()} == {NOT}
    assert all("different fixed parts" in c.why for c in found.values())
    _, found = certify(pair(Residual, sigma=0.01), VECTORS)
    assert {c.says for c in found.values()} == {NOT}
    assert all("what was trained outweighs the fixed parts" in c.why for c in found.values())


def test_frozen_neurons_are_no_inputs() -> None:
    graph, found = certify(pair(Gated), IMAGES)
    # the stem's channels are frozen, in an order that only training knows; what reads them is not anchored
    assert not any(x.tensor == "stem.weight" and x.axis == 0 for s in graph.spaces for x in s.axes)
    last = by_writer(graph, found, "next.weight")
    assert last.says == IF_INPUTS and "frozen neurons" in last.gap


def test_what_reads_inputs_is_what_no_parameter_changes() -> None:
    model = pair(Gated)[0]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loaded = load(model, example_inputs=IMAGES)
    assert entries(model, loaded.example, loaded.forward) == {"stem"}
    after = model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_a_depthwise_convolution_anchors_nothing() -> None:
    _, found = certify(pair(Deep), IMAGES)
    assert {c.says for c in found.values()} == {IDENTIFIED}
    # it reads the neurons that it writes
    _, found = certify(pair(Deep, layers=["deep", "narrow"]), IMAGES)
    assert IDENTIFIED not in {c.says for c in found.values()}


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=5)


SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 40, "vocab_size": 60}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
FAMILIES = {
    "vit": vit,
    "resnet": lambda: timm.create_model("test_resnet", num_classes=4),
    "convnext": lambda: timm.create_model("test_convnext", num_classes=4),
    "efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=4),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SMALL)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)),
}
INPUTS = {"vit": torch.randn(2, 3, 32, 32, generator=seeded(1))}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_is_anchored_by_default(name: str) -> None:
    graph, found = certify(pair(FAMILIES[name]), INPUTS.get(name))
    assert found and {c.says for c in found.values()} == {IDENTIFIED}, {c.why for c in found.values()}
    # heads, and what lies in them, are judged by the rows of what they hold
    if name in ("vit", "bert", "llama"):
        assert any(not s.axes or s.parents for s in graph.spaces)


def test_a_model_whose_outputs_are_its_stream_is_not_anchored() -> None:
    # the stream is frozen, because callers read it, but two networks need not agree on it
    _, found = certify(pair(lambda: BertModel(BertConfig(**SMALL), add_pooling_layer=False)))
    assert {c.says for c in found.values()} == {IF_INPUTS}


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_swapped_neurons_are_not_identified(name: str) -> None:
    a, b = pair(FAMILIES[name])
    x = INPUTS.get(name)
    graph = mergeid.graph(a, x)
    stream = graph.spaces[0]
    order = np.arange(stream.size)
    order[[0, 5]] = order[[5, 0]]
    element = {**graph.identity(), stream.id: order}
    b.load_state_dict(graph.apply_state(element, b.state_dict()))
    found = certified(Pair(load(a, example_inputs=x), load(b, example_inputs=x), graph), None)
    # F and D moved along: nothing that the swap touched is shared any more
    assert IDENTIFIED not in {c.says for c in found.values()}
    assert "different fixed parts" in found[stream.id].why


def test_a_base_is_a_fixed_part_of_everything() -> None:
    torch.manual_seed(0)
    base = FAMILIES["bert"]().eval()

    def tuned(seed: int, size: float) -> nn.Module:
        other = copy.deepcopy(base)
        with torch.no_grad():
            for value in other.parameters():
                if value.dim() > 1:
                    value.add_(size * value.std() * torch.randn(value.shape, generator=seeded(seed)))
        return other

    _, near = certify((tuned(1, 0.2), tuned(2, 0.2)), base=base)
    assert {c.says for c in near.values()} == {IDENTIFIED}
    _, far = certify((tuned(1, 3.0), tuned(2, 3.0)), base=base)
    assert IDENTIFIED not in {c.says for c in far.values()}
