"""A matched merge is written only where it is not further from the models than the plain one."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from torch import nn

import mergeid
import mergeid.merging
from mergeid.comparing import compare, unmatched
from mergeid.data import collate
from mergeid.load import load
from mergeid.members import Member, Members
from mergeid.merge.methods import get_method
from mergeid.merge.settings import MergeSettings


def classifier(seed):
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=5).eval()


class Pictures(torch.utils.data.Dataset):
    def __init__(self, count=24):
        self.x = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i]}


def members(models, weights=(0.5, 0.5)):
    loaded = [load(m) for m in models]
    settings = MergeSettings.of(get_method("linear"), len(models), list(models[0].state_dict()), weights=list(weights))
    return Members([Member(x) for x in loaded], None, settings, Pictures(), collate)


def test_scores_against_a_naive_loop():
    a, b, one, other = (classifier(s) for s in range(4))
    found = compare(members([a, b], (0.3, 0.7)), one.state_dict(), other.state_dict(), batch_size=7, device="cpu")
    for net, got in ((one, found.direct), (other, found.matched)):
        losses = []
        for item in Pictures():
            x = item["x"][None]
            with torch.no_grad():
                p = 0.3 * a(x)[0].double().softmax(0) + 0.7 * b(x)[0].double().softmax(0)
                q = net(x)[0].double().softmax(0)
            losses.append(-sum(float(p[k]) * np.log(float(q[k])) for k in range(5)))
        assert got == pytest.approx(np.mean(losses), rel=1e-5)
    assert (found.unit, found.examples) == ("nats", 24)


@pytest.mark.parametrize("size", [1, 5, 24])
def test_batches_do_not_matter_and_equal_merges_are_a_tie(size):
    a, b = classifier(0), classifier(1)
    group = members([a, b])
    same = compare(group, b.state_dict(), b.state_dict(), batch_size=size, device="cpu")
    assert same.direct == same.matched and not same.worse
    first, second = (compare(group, a.state_dict(), b.state_dict(), batch_size=n, device="cpu") for n in (size, 24))
    assert first.direct == pytest.approx(second.direct, rel=1e-6)


def test_the_further_merge_is_the_worse_one():
    a = classifier(0)
    group = members([a, copy.deepcopy(a)])
    broken = {k: v + torch.randn_like(v) if v.is_floating_point() else v for k, v in a.state_dict().items()}
    assert compare(group, a.state_dict(), broken, batch_size=8, device="cpu").worse
    assert not compare(group, broken, a.state_dict(), batch_size=8, device="cpu").worse
    infinite = {k: v * float("nan") if v.is_floating_point() else v for k, v in broken.items()}
    assert compare(group, a.state_dict(), infinite, batch_size=8, device="cpu").worse
    assert not compare(group, infinite, a.state_dict(), batch_size=8, device="cpu").worse


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)).eval()


def rows():
    return [{"arg0": x} for x in torch.randn(64, 6, generator=torch.Generator().manual_seed(3))]


def wrong_plan(monkeypatch):
    """Plans that would match everything at random."""
    honest = mergeid.merging.plan_pair

    def planned(*args, **kwargs):
        found = honest(*args, **kwargs)
        found.plan.element = found.plan.graph.random_element(torch.Generator().manual_seed(5))
        found.plan.verdict = "match"
        return found

    monkeypatch.setattr(mergeid.merging, "plan_pair", planned)


def test_a_wrong_match_is_not_used(monkeypatch):
    a, b = network(), network()
    with torch.no_grad():
        for p in b.parameters():
            p += 0.01 * torch.randn_like(p)
    wrong_plan(monkeypatch)
    result = mergeid.merge(a, b, data=rows(), example_inputs=torch.randn(2, 6))
    assert result.verdict == "direct" and not result.plan.moves
    assert any("matching was not used: on 64 calibration examples" in note for note in result.notes)
    assert result.comparison["worse"] and result.comparison["unit"] == "relative"
    for key, value in result.state.items():
        assert torch.equal(value, (a.state_dict()[key] + b.state_dict()[key]) / 2)
    forced = mergeid.merge(a, b, data=rows(), example_inputs=torch.randn(2, 6), match="always")
    assert forced.comparison is None and forced.verdict == "match"


def test_a_right_match_is_kept():
    a = network()
    graph = mergeid.graph(a, torch.randn(2, 6))
    b = network()
    b.load_state_dict(graph.apply_state(graph.random_element(torch.Generator().manual_seed(1)), b.state_dict()))
    result = mergeid.merge(a, b, data=rows(), example_inputs=torch.randn(2, 6))
    assert result.verdict == "match" and not result.comparison["worse"]
    assert result.comparison["matched"] < 1e-6 < result.comparison["direct"]
    for key, value in result.state.items():
        torch.testing.assert_close(value, a.state_dict()[key])


def test_unmatched_keeps_the_plan_but_its_permutation():
    a = network()
    graph = mergeid.graph(a, torch.randn(2, 6))
    b = network()
    b.load_state_dict(graph.apply_state(graph.random_element(torch.Generator().manual_seed(1)), b.state_dict()))
    plan = mergeid.plan(a, b, data=rows(), example_inputs=torch.randn(2, 6))
    loaded = load(b, example_inputs=torch.randn(2, 6))
    group = Members([Member(load(a, example_inputs=torch.randn(2, 6))), Member(loaded, plan)], None, None)
    plain = unmatched(group)
    assert plan.moves and not plain.models[1].plan.moves
    assert all(torch.equal(plain.models[1].tensor(k), v) for k, v in b.state_dict().items())
