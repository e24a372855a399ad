"""Plans of trained networks that were made to merge: what the structure decides without data, and what it does not."""

from __future__ import annotations

import copy
import io
import json
from functools import cache
from math import cos, pi
from typing import Any

import pytest
import torch
from rich.console import Console
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import mergeid
from mergeid import nn as mnn
from mergeid.evidence.anchored import IDENTIFIED, IF_INPUTS, NOT, Certificate
from mergeid.evidence.decide import DIRECT, MATCH, SpaceEvidence
from mergeid.evidence.hold import WIDEST
from mergeid.reporting.show_plan import print_plan
from mergeid.results.plan import Plan
from mergeid.stages.structure import AS_DECIDED, contradictions

TRAIN = 1200


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] in a fixed random order, and labels."""
    raw = load_digits()
    x = torch.from_numpy(raw.images).float()[:, None]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return ((x - x.mean()) / x.std())[order], torch.from_numpy(raw.target).long()[order]


def mlp() -> nn.Module:
    wide = [m for a in (64, 128) for m in (nn.Linear(a, 128), nn.LayerNorm(128), nn.GELU())]
    return nn.Sequential(nn.Flatten(), *wide, nn.Linear(128, 10))


def vit() -> nn.Module:
    size = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10}
    return VisionTransformer(**size, embed_dim=48, depth=2, num_heads=2, mlp_ratio=2)


def trained(make, seed: int, *, fixed: int | None = 9, sigma: float = 1.0, layers: Any = None) -> nn.Module:
    """One network; `seed` draws all but the fixed parts."""
    x, y = digits()
    torch.manual_seed(seed)
    model = make()
    if fixed is not None:
        mnn.asymmetrise(model, "w", sigma=sigma, layers=layers, generator=torch.Generator().manual_seed(fixed))
    epochs, each = (15, 2e-3) if make is vit else (10, 3e-3)
    steps = epochs * (TRAIN // 32)
    optimiser = torch.optim.AdamW(model.parameters(), each, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min(1.0, 10 * (s + 1) / steps) * (1 + cos(pi * s / steps)) / 2
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(TRAIN, generator=generator)[: steps // epochs * 32].split(32):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            rate.step()
    return model.eval()


def plan_of(a: nn.Module, b: nn.Module, **settings: Any) -> Plan:
    return mergeid.plan(a, b, example_inputs=digits()[0][:2], **settings)


def lost(a: nn.Module, b: nn.Module) -> float:
    """Nats that the midpoint of two networks loses on held-out digits, as they lie."""
    x, y = (v[TRAIN:] for v in digits())
    middle = copy.deepcopy(a)
    one, two = a.state_dict(), b.state_dict()
    middle.load_state_dict({k: (v + two[k]) / 2 if v.is_floating_point() else v for k, v in one.items()})
    with torch.no_grad():
        ends, at = [float(F.cross_entropy(m(x), y)) for m in (a, b)], float(F.cross_entropy(middle(x), y))
    return at - sum(ends) / 2


def shown(plan: Plan) -> str:
    out = io.StringIO()
    print_plan(plan, Console(file=out, width=400))
    return " ".join(out.getvalue().split())


@pytest.fixture(scope="module")
def anchored() -> tuple[nn.Module, nn.Module]:
    return trained(mlp, 0), trained(mlp, 1)


def test_anchored_networks_are_decided_without_data_and_merge(anchored) -> None:
    plan = plan_of(*anchored)
    assert plan.evidence == "structure" and plan.verdict == DIRECT and not plan.moves
    assert plan.structure["decides"] and plan.structure["identified"] == len(plan.spaces) == 2
    assert "isotropic (P = I)" in plan.structure["inputs"]
    for space in plan.spaces:
        assert space.decision == DIRECT and space.why.startswith(
            "identified by structure: fixed parts hold its neurons"
        )
        assert space.certificate is not None and space.certificate.says == IDENTIFIED
        assert max(space.certificate.angle_a, space.certificate.angle_b) < WIDEST
    assert any("no calibration data is needed for the order" in n and "P = I" in n for n in plan.notes)
    assert not any("weaker evidence" in n for n in plan.notes)
    text = shown(plan)
    assert "judged by structure" in text and "Identified by structure: 2 of 2 spaces." in text and "°" in text
    assert json.loads(json.dumps(plan.to_json(), allow_nan=False))["spaces"][0]["certificate"]["says"] == IDENTIFIED
    assert lost(*anchored) <= 0.05
    merged = mergeid.merge(*anchored, example_inputs=digits()[0][:2])
    assert merged.verdict == DIRECT
    for key, value in anchored[0].state_dict().items():
        torch.testing.assert_close(merged.state[key], (value + anchored[1].state_dict()[key]) / 2)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"sigma": 0.01}, "what was trained outweighs the fixed parts"),
        ({"fixed": 8}, "the two models have different fixed parts"),
        ({"layers": ["4"]}, "no fixed part that both models share writes it"),
    ],
)
def test_weak_other_or_missing_fixed_parts_decide_nothing(anchored, changes, why) -> None:
    if "fixed" in changes:
        plan = plan_of(anchored[0], trained(mlp, 1, **changes))
    else:
        plan = plan_of(*(trained(mlp, s, **changes) for s in (0, 1)))
    assert plan.evidence == "weights" and not plan.structure["decides"]
    first = plan.spaces[0].certificate
    assert first is not None and first.says == NOT and why in first.why
    assert any("it decides nothing" in n for n in plan.notes) and any("weaker evidence" in n for n in plan.notes)
    assert "Not identified" in shown(plan) and why in shown(plan)


def test_without_fixed_parts_nothing_is_said() -> None:
    plan = plan_of(*(trained(mlp, s, fixed=None) for s in (0, 1)))
    assert plan.evidence == "weights" and not plan.structure["computed"]
    assert all(s.certificate is None for s in plan.spaces)


def test_with_data_the_chain_is_said_and_activations_decide(anchored) -> None:
    data = [{"arg0": v} for v in digits()[0][:256]]
    plan = plan_of(*anchored, data=data)
    assert plan.evidence == "activations" and plan.structure["identified"] == 2
    assert "Identified by structure: 2 of 2 spaces." in shown(plan)
    free = plan_of(*(trained(mlp, s, layers=["4"]) for s in (0, 1)), data=data)
    first, second = free.spaces
    assert first.certificate.says == NOT and second.certificate.says == IF_INPUTS
    assert second.certificate.breaks == (first.id,)
    text = shown(free)
    assert "Identified by structure: 0 of 2 spaces." in text
    assert f"Identified if the inputs correspond: 1. The chain from the inputs breaks at {first.label}" in text


def test_certify_prints_radii_and_needs_data(anchored) -> None:
    data = [{"arg0": v} for v in digits()[0][:128]]
    base = anchored[0]
    plain = [copy.deepcopy(mlp()) for _ in range(3)]
    for k, model in enumerate(plain):
        model.load_state_dict(mnn.fold(base))
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.01 * k * torch.randn(value.shape, generator=torch.Generator().manual_seed(k)))
    plan = plan_of(plain[1], plain[2], base=plain[0], data=data, certify=True)
    text = shown(plan)
    assert "ε*/g" in text and "ε*/‖Σ‖" in text and "Certified shifts of the inputs" in text
    for space in plan.spaces:
        for layer in space.structure.layers:
            radii = [side.radius for side in (layer.a, layer.b)]
            assert all(r is not None and r > 0 for r in radii)
            assert f"{min(radii):.2g}" in text
    assert "ε*/g" not in shown(plan_of(plain[1], plain[2], base=plain[0], data=data))
    without = plan_of(plain[1], plain[2], base=plain[0], certify=True)
    assert without.evidence == "structure" and any("--certify needs --data" in n for n in without.notes)


def test_contradictions_are_named() -> None:
    def space(decision: str, says: str, iota: float | None) -> SpaceEvidence:
        made = Certificate("s", says, "", 10.0, 10.0)
        return SpaceEvidence(
            "s", "hidden", 4, 1, (), 0.5, decision, "", "activations", iota=iota, certificate=made
        )  # fmt: skip

    (note,) = contradictions([space(MATCH, IDENTIFIED, 0.04), space(DIRECT, IDENTIFIED, 0.9)], {})
    assert "contradict each other in 1 of 2 spaces" in note and "hidden" in note and "ι = 0.04" in note
    # the inputs do not correspond, nothing was measured, or B was judged in the order that was decided
    for one, orders in (
        (space(MATCH, IF_INPUTS, 0.04), {}),
        (space(MATCH, IDENTIFIED, None), {}),
        (space(MATCH, IDENTIFIED, 0.8), {}),
        (space(MATCH, IDENTIFIED, 0.04), {"s": AS_DECIDED}),
    ):
        assert contradictions([one], orders) == []


@pytest.mark.slow
def test_vits_from_independent_seeds() -> None:
    models = [trained(vit, s) for s in (0, 1)]
    plan = plan_of(*models)
    assert plan.evidence == "structure" and plan.verdict == DIRECT
    assert {s.certificate.says for s in plan.spaces} == {IDENTIFIED}
    held = lost(*models)
    # the blocks fixed as well, but neither the patch embedding nor the tokens: no chain, whatever the margins are
    free = [trained(vit, s, layers=["blocks.*"]) for s in (0, 1)]
    for settings in ({}, {"data": [{"arg0": v} for v in digits()[0][:256]]}):
        loose = plan_of(*free, **settings)
        assert loose.evidence != "structure" and IDENTIFIED not in {s.certificate.says for s in loose.spaces}
        stream = next(s for s in loose.spaces if s.size == 48 and not s.parents)
        assert all(stream.id in s.certificate.breaks for s in loose.spaces)
    plain = [trained(vit, s, fixed=None) for s in (0, 1)]
    assert plan_of(*plain).evidence == "weights"
    for changes in ({"sigma": 0.01}, {"fixed": 8}):
        other = plan_of(models[0] if "fixed" in changes else trained(vit, 0, **changes), trained(vit, 1, **changes))
        assert other.evidence == "weights" and IDENTIFIED not in {s.certificate.says for s in other.spaces}
    assert held < 0.3 < lost(*free) and held < lost(*plain)
