"""Where F and D come from: stored tensors, base checkpoints, LoRA adapters, given arrays, nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mergeid.errors import MergeidError
from mergeid.evidence.inputs import supports
from mergeid.evidence.margin import margin
from mergeid.evidence.sources import effective_weight, fixed_part, from_base, given, lora_rows, stored


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def asymmetric(seed):
    fixed, mask = random(4, 6, seed=0), (random(4, 6, seed=1) > -0.5).float()
    return {
        "l.weight": random(4, 6, seed=seed),
        "l.weight_fixed": fixed,
        "l.weight_mask": mask,
        "l.bias": torch.ones(4),
    }


def test_stored_tensors():
    a, b = asymmetric(2), asymmetric(3)
    part = fixed_part("l.weight", a, b, base={"l.weight": torch.zeros(4, 6)})
    assert part.source == "stored"
    assert torch.equal(part.fixed, a["l.weight_fixed"]) and torch.equal(part.scaling, a["l.weight_mask"])
    expected = a["l.weight_fixed"] + a["l.weight_mask"] * a["l.weight"]
    assert torch.equal(effective_weight(a, "l.weight"), expected)
    noise = {k: v for k, v in a.items() if not k.endswith("_mask")}
    assert stored("l.weight", noise, noise).scaling is None
    assert torch.equal(effective_weight(noise, "l.weight"), a["l.weight_fixed"] + a["l.weight"])
    assert torch.equal(effective_weight(a, "l.bias"), a["l.bias"])
    assert stored("l.bias", a, b) is None


@pytest.mark.parametrize("key", ["l.weight_fixed", "l.weight_mask"])
def test_models_that_store_different_parts_are_refused(key):
    a, b = asymmetric(2), asymmetric(3)
    b[key] = b[key] + 1
    with pytest.raises(MergeidError, match=f"do not store the same '{key}'"):
        fixed_part("l.weight", a, b)
    del b[key]
    with pytest.raises(MergeidError, match="do not store the same"):
        fixed_part("l.weight", a, b)


def test_base_checkpoint_and_frozen_tensors():
    base, a = {"l.weight": random(4, 6, seed=0)}, {"l.weight": random(4, 6, seed=1)}
    part = fixed_part("l.weight", a, a, base=base)
    assert part.source == "base" and torch.equal(part.fixed, base["l.weight"]) and part.scaling is None
    part = fixed_part("l.weight", a, a, base=base, frozen=["l.*"])
    assert torch.equal(part.scaling, torch.zeros(4, 6))
    effective = from_base("l.weight", asymmetric(5)).fixed
    assert torch.equal(effective, effective_weight(asymmetric(5), "l.weight"))
    with pytest.raises(MergeidError, match="no tensor 'x'"):
        from_base("x", base)
    with pytest.raises(MergeidError, match="in the base and"):
        fixed_part("l.weight", a, a, base={"l.weight": torch.zeros(3, 6)})


def test_lora_rows_of_both_runs():
    rows = [random(2, 6, seed=s) for s in range(2)]
    adapters = [
        {
            "base_model.model.l.lora_A.weight": rows[0],
            "base_model.model.l.lora_B.weight": random(4, 2, seed=9),
            "base_model.model.other.l.lora_A.weight": random(2, 6, seed=8),
        },
        {"base_model.model.l.lora_A.default.weight": rows[1]},
    ]
    q = lora_rows("l.weight", adapters)
    assert q.shape == (6, 4)
    torch.testing.assert_close(q.T @ q, torch.eye(4, dtype=torch.float64))
    both = torch.cat(rows).double()
    torch.testing.assert_close(both @ q @ q.T, both)
    same = lora_rows("l.weight", [adapters[0], adapters[0]])
    assert same.shape == (6, 2)
    base, a = {"l.weight": random(4, 6, seed=0), "k.weight": random(4, 6, seed=1)}, {"l.weight": random(4, 6, seed=3)}
    part = fixed_part("l.weight", a, a, base=base, adapters=adapters)
    assert part.source == "lora" and part.scaling is None
    torch.testing.assert_close(part.row_space @ part.row_space.T, q @ q.T)
    untouched = fixed_part("k.weight", base, base, base=base, adapters=adapters)
    assert untouched.source == "base" and not untouched.scaling.any()
    assert lora_rows("k.weight", adapters) is None
    with pytest.raises(MergeidError, match="need the base checkpoint"):
        fixed_part("l.weight", a, a, adapters=adapters)
    kernel = {"l.weight": torch.zeros(4, 6, 1)}
    with pytest.raises(MergeidError, match="only matrices"):
        fixed_part("l.weight", kernel, kernel, base=kernel, adapters=adapters)


def test_given_arrays():
    part = given(torch.ones(2, 3), row_space=torch.tensor([[2.0, 4.0], [0, 0], [0, 0]]))
    assert part.source == "given"
    torch.testing.assert_close(part.row_space.abs(), torch.tensor([[1.0], [0], [0]], dtype=torch.float64))
    with pytest.raises(MergeidError, match="shape of F"):
        given(torch.ones(2, 3), torch.ones(3))


def test_lora_fine_tunes_are_identified_by_their_base():
    """Both runs move little along their own rows: every neuron stays nearest to its own base neuron."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 8)
    base = {"0.weight": layer.weight.detach().clone()}
    x = torch.randn(200, 12) @ torch.diag(torch.linspace(2, 0.1, 12))
    support = supports(nn.Sequential(layer), [{"x": x}], lambda m, b: m(b["x"]), ["0"], tau=0.99)["0"]
    rows = [random(5, 12, seed=s) for s in (1, 2)]
    adapters = [{"base_model.model.0.lora_A.weight": r} for r in rows]
    tuned = [{"0.weight": base["0.weight"] + 0.05 * random(8, 5, seed=3 + s) @ r} for s, r in enumerate(rows)]
    part = fixed_part("0.weight", *tuned, base=base, adapters=adapters)
    for state in tuned:
        cost = part.classes(layer, support).costs(state["0.weight"])
        assert torch.isfinite(cost.diagonal()).all() and margin(cost).identifiable
        # the trained part's norm is what the class says, where it is seen at all
        trained = (state["0.weight"] - base["0.weight"]).double()
        assert (cost.diagonal() <= trained.square().sum(1) * (1 + 1e-6)).all()


def test_nothing_known_gives_a_margin_of_zero():
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    x = torch.randn(100, 6)
    support = supports(nn.Sequential(layer), [{"x": x}], lambda m, b: m(b["x"]), ["0"])["0"]
    state = {"0.weight": layer.weight.detach()}
    part = fixed_part("0.weight", state, state)
    assert part.source == "nothing" and not part.fixed.any() and part.scaling is None
    found = margin(part.classes(layer, support).costs(state["0.weight"]))
    assert found.value == 0 and found.identity_optimal and not found.identifiable


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), torch.randn(20, 4, 5, 5)),
        (Conv1D(6, 4), torch.randn(30, 4)),
        (nn.Embedding(9, 6), torch.randint(0, 9, (30, 3))),
    ],
    ids=["convolution", "Conv1D", "embedding"],
)
def test_classes_of_other_layers(layer, x):
    model = nn.Sequential(layer)
    found = supports(model, [{"x": x}], lambda m, b: m(b["x"]), ["0"], tau=1.0)["0"]
    weight = layer.weight.detach()
    base = {"0.weight": weight + 0.01 * random(*weight.shape, seed=1)}
    mask = torch.ones_like(weight)
    cost = (
        given(base["0.weight"], mask)
        .classes(layer, found)
        .costs(weight.T if isinstance(layer, (Conv1D, nn.Embedding)) else weight.flatten(1))
    )
    assert cost.shape == (6, 6)
    own = (weight - base["0.weight"]).double()
    own = own.T if isinstance(layer, (Conv1D, nn.Embedding)) else own.flatten(1)
    # the whole space is seen, so that the cost is the whole difference
    np.testing.assert_allclose(cost.diagonal().numpy(), own.square().sum(1).numpy(), rtol=1e-4)
    assert torch.isinf(cost).sum() == (18 if isinstance(layer, nn.Conv2d) else 0)
