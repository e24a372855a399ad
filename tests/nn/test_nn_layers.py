"""Asymmetric layers one by one: what F and D are, and what training may touch."""

from __future__ import annotations

import copy
import pickle
from math import comb, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from mergeid import MergeidError
from mergeid import nn as mnn
from mergeid.nn.w_asymmetric import distinct_masks

LAYERS = {
    "linear": (lambda: nn.Linear(12, 7), (5, 12)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2), (2, 4, 9, 9)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 5, 5)),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=LAYERS)
def layer_and_input(request):
    make, shape = LAYERS[request.param]
    torch.manual_seed(1)
    return make(), torch.randn(shape)


# -- definitions --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(1, 11), st.integers(1, 40), st.integers(0, 99))
def test_masks_are_distinct_and_of_one_size_or_refused(entries, count, neurons, seed):
    if count >= entries:
        count = entries - 1
    if comb(entries, count) < neurons:
        with pytest.raises(MergeidError, match=f"give only {comb(entries, count)}"):
            distinct_masks(neurons, entries, count, seeded(seed))
        return
    masks = distinct_masks(neurons, entries, count, seeded(seed))
    assert masks.shape == (neurons, entries)
    assert ((~masks).sum(1) == count).all()
    assert len({tuple(row) for row in masks.tolist()}) == neurons


def test_every_entry_is_fixed_equally_often():
    masks = torch.stack([distinct_masks(6, 8, 2, seeded(s)) for s in range(400)])
    share = (~masks).double().mean((0, 1)).numpy()
    # 2,400 draws with probability 1/4 each: five standard errors
    np.testing.assert_allclose(share, 0.25, atol=5 * sqrt(0.25 * 0.75 / 2400))


@pytest.mark.parametrize("fixed", [0.25, 3])
def test_w_asymmetric_by_a_naive_loop(layer_and_input, fixed):
    layer, _ = layer_and_input
    trained = layer.weight.detach().clone()
    mnn.asymmetric_layer(layer, "w", sigma=2.0, fixed=fixed, generator=seeded())
    frozen, mask = layer.weight_fixed, layer.weight_mask
    flat_w, flat_f, flat_d, flat_e = (
        t.detach().reshape(len(t), -1).tolist() for t in (trained, frozen, mask, layer.weight)
    )
    entries = len(flat_w[0])
    expected = round(fixed * entries) if fixed < 1 else fixed
    for w, f, d, e in zip(flat_w, flat_f, flat_d, flat_e, strict=True):
        assert sum(v == 0 for v in d) == expected
        for k in range(entries):
            assert d[k] in (0.0, 1.0)
            # a fixed entry has F only, a free one W only
            assert e[k] == (w[k] if d[k] else f[k])
            assert f[k] == 0 if d[k] else f[k] != 0


def test_the_fixed_entries_have_the_standard_deviation_that_was_asked_for():
    layer = mnn.asymmetric_layer(nn.Linear(400, 300), "w", sigma=1.7, fixed=0.5, generator=seeded())
    drawn = layer.weight_fixed[layer.weight_mask == 0].double()
    assert len(drawn) == 60_000
    assert drawn.std().item() == pytest.approx(1.7, rel=0.02) and abs(drawn.mean().item()) < 0.03


def test_syre_adds_a_static_value_to_weights_and_biases(layer_and_input):
    layer, _ = layer_and_input
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    mnn.asymmetric_layer(layer, "syre", sigma=0.5, generator=seeded())
    for name, value in before.items():
        static = getattr(layer, f"{name}_fixed")
        assert torch.equal(getattr(layer, name), static + value)
        assert not hasattr(layer, f"{name}_mask")
        assert static.std() > 0


def test_forward_is_the_ordinary_layer_with_effective_weights(layer_and_input):
    layer, x = layer_and_input
    plain = copy.deepcopy(layer)
    for kind in ("w", "syre"):
        made = mnn.asymmetric_layer(copy.deepcopy(layer), kind, generator=seeded())
        plain.load_state_dict(mnn.fold(made))
        assert torch.equal(made(x), plain(x))
        assert isinstance(made, type(plain)) and isinstance(made, mnn.Asymmetric)


def test_sigma_asymmetric_by_a_naive_loop():
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64)
    gate = mnn.fixed_gate(5, 0, sigma=1.0, generator=seeded()).double()
    made = mnn.give_gate(nn.GELU(), gate)(x)
    for row in range(3):
        for i in range(5):
            mixed = sum(gate[i, j].item() * x[row, j].item() for j in range(5))
            expected = 2 / (1 + np.exp(-mixed)) * F.gelu(x[row, i]).item()
            assert made[row, i].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("places", [1, 2])
def test_sigma_asymmetric_on_channels_is_the_same_map_at_every_place(places):
    torch.manual_seed(0)
    x = torch.randn(2, 6, *[4] * places)
    kernel = mnn.fixed_gate(6, places, sigma=1.0, generator=seeded())
    convolved = mnn.give_gate(nn.ReLU(inplace=True), kernel)(x.clone())
    flat = mnn.give_gate(nn.ReLU(), kernel.reshape(6, 6))(x.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(convolved, flat)


def test_a_permutation_of_neurons_is_no_symmetry_of_a_gated_activation():
    x, order = torch.randn(4, 6, generator=seeded(3)), torch.tensor([1, 0, 2, 3, 4, 5])
    plain, gated = nn.GELU(), mnn.give_gate(nn.GELU(), mnn.fixed_gate(6, 0, sigma=1.0, generator=seeded()))
    assert torch.equal(plain(x[:, order]), plain(x)[:, order])
    assert (gated(x[:, order]) - gated(x)[:, order]).abs().max() > 0.01


# -- randomness, training, copies ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["w", "syre"])
def test_fixed_parts_come_from_the_generator_alone(kind):
    def parts(weights: int, fixed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(weights)
        layer = mnn.asymmetric_layer(nn.Linear(20, 10), kind, generator=seeded(fixed), preserve_scale=True)
        return dict(layer.named_buffers())

    first, again, other = parts(0, 5), parts(1, 5), parts(0, 6)
    assert first and first.keys() == again.keys()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["weight_fixed"], other["weight_fixed"])
    before = torch.get_rng_state()
    mnn.asymmetric_layer(nn.utils.skip_init(nn.Linear, 20, 10), kind, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["w", "syre"])
@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW])
def test_training_moves_w_and_never_f_or_d(layer_and_input, kind, optimiser):
    layer, x = layer_and_input
    mnn.asymmetric_layer(layer, kind, generator=seeded())
    start = {k: v.clone() for k, v in layer.state_dict().items()}
    first = layer.weight.detach().clone()
    steps = optimiser(mnn.decay_groups(layer, 0.1), lr=0.05)
    for _ in range(3):
        steps.zero_grad()
        layer(x).square().mean().backward()
        steps.step()
    end = layer.state_dict()
    fixed = [k for k in start if k.endswith(("_fixed", "_mask"))]
    assert fixed and all(torch.equal(start[k], end[k]) for k in fixed)
    assert not torch.equal(start["weight"], end["weight"])
    if kind == "w":
        frozen = layer.weight_mask == 0
        assert torch.equal(layer.weight[frozen], first[frozen])
        assert layer._parameters["weight"].grad[frozen].abs().max() == 0


def test_the_gradient_is_that_of_the_effective_weight_through_the_mask(layer_and_input):
    layer, x = layer_and_input
    layer, x = layer.double(), x.double()
    mnn.asymmetric_layer(layer, "w", generator=seeded(), preserve_scale=True)
    layer(x).square().sum().backward()
    plain = mnn.fold_module(copy.deepcopy(layer))
    plain.zero_grad()
    plain(x).square().sum().backward()
    torch.testing.assert_close(layer._parameters["weight"].grad, layer.weight_mask * plain.weight.grad)


def test_syre_decays_biases_and_towards_the_static_value():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    mnn.asymmetrise(model, "syre", layers="0", generator=seeded())
    groups = mnn.decay_groups(model, 0.3)
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0]
    decayed = {id(p) for p in groups[0]["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in decayed}
    assert names == {"0.weight", "0.bias", "2.weight"}
    steps = torch.optim.SGD(groups, lr=1.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(60):
        steps.step()
    torch.testing.assert_close(model[0].weight.detach(), model[0].weight_fixed, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["w", "syre"])
def test_copies_pickles_and_casts_compute_alike(layer_and_input, kind):
    layer, x = layer_and_input
    mnn.asymmetric_layer(layer, kind, generator=seeded())
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected) and type(other) is type(layer)
        with torch.no_grad():
            other._parameters["weight"].zero_()
        assert torch.equal(layer(x), expected)
    wide = copy.deepcopy(layer).double()
    assert wide.weight.dtype == wide.weight_fixed.dtype == torch.float64
    torch.testing.assert_close(wide(x.double()).float(), expected)


def test_functional_call_replaces_w_and_keeps_f(layer_and_input):
    layer, x = layer_and_input
    mnn.asymmetric_layer(layer, "syre", generator=seeded())
    zero = {n: torch.zeros_like(p) for n, p in layer.named_parameters()}
    found = torch.func.functional_call(layer, zero, (x,))
    plain = mnn.fold_module(copy.deepcopy(layer))
    plain.load_state_dict({n: getattr(layer, f"{n}_fixed") for n in zero})
    torch.testing.assert_close(found, plain(x))


def test_a_readers_own_product_sees_the_effective_weight():
    layer = mnn.asymmetric_layer(nn.Linear(8, 8), "w", generator=seeded())
    x = torch.randn(3, 8, generator=seeded(1))
    assert torch.equal(F.linear(x, layer.weight, layer.bias), layer(x))
    assert layer.weight.requires_grad and not layer.weight_fixed.requires_grad


@pytest.mark.parametrize("kind", ["w", "syre"])
@pytest.mark.parametrize("sigma", [0.0, 0.3, 5.0])
def test_preserving_the_scale_keeps_the_proportions_and_the_output_variance(kind, sigma):
    torch.manual_seed(0)
    raw = nn.Linear(400, 300)
    nn.init.normal_(raw.weight, std=400**-0.5)
    kept = copy.deepcopy(raw)
    mnn.asymmetric_layer(raw, kind, sigma=sigma, generator=seeded())
    mnn.asymmetric_layer(kept, kind, sigma=sigma, generator=seeded(), preserve_scale=True)
    factor = (kept.weight.norm() / raw.weight.norm()).detach()
    torch.testing.assert_close(kept.weight, factor * raw.weight)
    assert kept.weight.square().sum(1).mean().sqrt().item() == pytest.approx(1, rel=0.02)


# -- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixed", [0.01, 0, 12, 13, 2.5, 0.99])
def test_a_number_of_fixed_weights_that_leaves_none_free_is_refused(fixed):
    with pytest.raises(MergeidError, match="at least one fixed and one free"):
        mnn.asymmetric_layer(nn.Linear(12, 3), "w", fixed=fixed, generator=seeded())


def test_an_asymmetric_layer_is_not_made_asymmetric_again():
    layer = mnn.asymmetric_layer(nn.Linear(12, 3), "w", generator=seeded())
    with pytest.raises(MergeidError, match="asymmetric already"):
        mnn.asymmetric_layer(layer, "syre", generator=seeded())


def test_parts_of_another_shape_are_refused():
    with pytest.raises(MergeidError, match=r"'fc'.*shape \[2, 3\], expected \[3, 2\]"):
        mnn.attach(nn.Linear(2, 3), {"weight": mnn.Parts(torch.zeros(2, 3))}, "fc")
    with pytest.raises(MergeidError, match="no parameter 'bias'"):
        mnn.attach(nn.Linear(2, 3, bias=False), {"bias": mnn.Parts(torch.zeros(3))}, "fc")


def test_a_gate_of_another_form_is_refused():
    with pytest.raises(MergeidError, match=r"expected a gate \[n, n\].*got \[3, 4\]"):
        mnn.give_gate(nn.ReLU(), torch.zeros(3, 4))
    gated = mnn.give_gate(nn.ReLU(), torch.zeros(3, 3))
    with pytest.raises(MergeidError, match="σ-asymmetric already"):
        mnn.give_gate(gated, torch.zeros(3, 3))


def test_kinds_and_layers_are_registered_once():
    with pytest.raises(ValueError, match="'w' is registered already"):
        mnn.kind("w", sigma=1.0, biases=False)(lambda *a, **k: None)
    with pytest.raises(ValueError, match="Linear is registered already"):
        mnn.register_layer(nn.Linear, {"weight": 0})
    with pytest.raises(MergeidError, match="unknown kind 'x'; expected one of sigma, syre, w"):
        mnn.asymmetric_layer(nn.Linear(12, 3), "x", generator=seeded())
