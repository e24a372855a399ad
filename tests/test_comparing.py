"""Another merge than the planned one is written only where it is nearer to the models."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from torch import nn

import mergeid
import mergeid.comparing
import mergeid.merging
from mergeid.comparing import compare
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


def far(members, merges, planned, size):
    """`compare` of state dicts by name."""
    nets = {}
    for name, state in merges.items():
        nets[name] = classifier(9)
        nets[name].load_state_dict(state)
    return compare(members, nets, planned, batch_size=size, device="cpu")


def test_scores_against_a_naive_loop():
    a, b, *nets = (classifier(s) for s in range(5))
    states = {name: net.state_dict() for name, net in zip(("plain", "mixed", "matched"), nets, strict=True)}
    found = far(members([a, b], (0.3, 0.7)), states, "mixed", 7)
    assert (found.unit, found.examples, list(found.distances)) == ("nats", 24, list(states))
    for net, got in zip(nets, found.distances.values(), strict=True):
        losses = []
        for item in Pictures():
            x = item["x"][None]
            with torch.no_grad():
                p = 0.3 * a(x)[0].double().softmax(0) + 0.7 * b(x)[0].double().softmax(0)
                q = net(x)[0].double().softmax(0)
            losses.append(-sum(float(p[k]) * np.log(float(q[k])) for k in range(5)))
        assert got == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("size", [1, 5, 24])
def test_batches_do_not_matter(size):
    a, b = classifier(0), classifier(1)
    first, second = (
        far(members([a, b]), {"plain": a.state_dict(), "mixed": b.state_dict()}, "mixed", n) for n in (size, 24)
    )
    assert first.distances["plain"] == pytest.approx(second.distances["plain"], rel=1e-6)


@pytest.mark.parametrize("planned", ["plain", "mixed", "matched"])
def test_ties_stay_with_the_plan(planned):
    a, b = classifier(0), classifier(1)
    found = far(members([a, b]), dict.fromkeys(("plain", "mixed", "matched"), b.state_dict()), planned, 8)
    assert found.chosen == planned and found.note is None


def noisy(model, size):
    """Its weights with noise of one draw."""
    generator = torch.Generator().manual_seed(1)
    return {
        k: v + size * torch.randn(v.shape, generator=generator) if v.is_floating_point() else v
        for k, v in model.state_dict().items()
    }


def test_the_nearest_merge_is_chosen_whatever_was_planned():
    a = classifier(0)
    group = members([a, copy.deepcopy(a)])
    order = ("plain", "mixed", "matched")
    for sizes in ((0, 0.3, 1), (0.3, 0, 1), (1, 0.3, 0), (1, 0.3, float("nan")), (float("nan"), 1, 0.3)):
        states = {name: noisy(a, size) for name, size in zip(order, sizes, strict=True)}
        best = order[int(np.nanargmin(sizes))]
        for planned in order:
            found = far(group, states, planned, 8)
            assert found.chosen == best
            assert (found.note is None) == (planned == best)


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
    assert (result.comparison["planned"], result.comparison["chosen"]) == ("mixed", "plain")
    assert result.comparison["unit"] == "relative"
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
    assert result.verdict == "match" and result.comparison["chosen"] == "matched" == result.comparison["planned"]
    assert result.comparison["distances"]["matched"] < 1e-6 < result.comparison["distances"]["plain"]
    for key, value in result.state.items():
        torch.testing.assert_close(value, a.state_dict()[key])


def scrambled():
    """A network, and the same with its neurons in another order."""
    a, b = network(), network()
    graph = mergeid.graph(a, torch.randn(2, 6))
    element = graph.random_element(torch.Generator().manual_seed(1))
    b.load_state_dict(graph.apply_state(element, b.state_dict()))
    return a, b


def half_a_plan(monkeypatch, moved, disputed=False):
    """Plans that match only the first `moved` spaces."""
    honest = mergeid.merging.plan_pair

    def planned(*args, **kwargs):
        found = honest(*args, **kwargs)
        plan = found.plan
        for space, record in list(zip(plan.graph.spaces, plan.spaces, strict=True))[moved:]:
            plan.element[space.id] = np.arange(space.size)
            gain = record.gain_low if disputed else None
            plan.spaces[plan.spaces.index(record)] = replace(record, decision="direct", gain_low=gain)
        plan.verdict = "match" if moved else "direct"
        return found

    monkeypatch.setattr(mergeid.merging, "plan_pair", planned)


@pytest.mark.parametrize(("moved", "disputed"), [(1, False), (0, True)])
def test_all_spaces_are_matched_where_that_is_nearer(monkeypatch, moved, disputed):
    a, b = scrambled()
    half_a_plan(monkeypatch, moved, disputed)
    result = mergeid.merge(a, b, data=rows(), example_inputs=torch.randn(2, 6))
    assert result.verdict == "match" and result.comparison["chosen"] == "matched"
    assert result.comparison["planned"] == ("mixed" if moved else "plain")
    assert any("every space was matched: on 64 calibration examples" in note for note in result.notes)
    for key, value in result.state.items():
        torch.testing.assert_close(value, a.state_dict()[key])
    # the file that is written beside a merge names what was done
    assert set(result.plan.to_json()["permutations"]) == {s.id for s in result.plan.graph.spaces}


def test_a_direct_plan_that_nothing_speaks_against_is_not_looked_at_again(monkeypatch):
    a, b = scrambled()
    half_a_plan(monkeypatch, 0)
    monkeypatch.setattr(mergeid.comparing, "compare", lambda *args, **kwargs: pytest.fail("networks were run"))
    result = mergeid.merge(a, b, data=rows(), example_inputs=torch.randn(2, 6))
    assert result.verdict == "direct" and result.comparison is None


def test_the_plan_carries_the_match_of_every_space():
    a, b = scrambled()
    inputs = torch.randn(2, 6)
    plan = mergeid.plan(a, b, data=rows(), example_inputs=inputs)
    always = mergeid.plan(a, b, data=rows(), example_inputs=inputs, match="always")
    assert all(np.array_equal(plan.matched[k], always.element[k]) for k in always.element)
    assert mergeid.plan(a, b, example_inputs=inputs).matched is None
