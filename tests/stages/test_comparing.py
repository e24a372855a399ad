"""The merge that is nearest to the models is written; ties stay with the plan."""

from __future__ import annotations

import copy
import io
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

import mergeid
import mergeid.stages.compare
import mergeid.stages.plan
from mergeid.data import collate
from mergeid.errors import WillNotMerge
from mergeid.evaluate.nearness import Panel
from mergeid.methods.registry import get_method
from mergeid.methods.settings import MergeSettings
from mergeid.models.examples import Examples
from mergeid.reporting.show_merge import print_merge
from mergeid.stages.compare import TIE, compare
from mergeid.stages.members import Member, Members
from mergeid.verbs.load import load


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
    merge = MergeSettings.of(get_method("linear"), len(models), list(models[0].state_dict()), weights=list(weights))
    return Members([Member(x) for x in loaded], None, merge, Examples(Pictures(), collate))


def far(members, merges, planned, size):
    """`compare` of state dicts by name."""
    panel = Panel(
        members.first,
        [m.loaded.model for m in members.models],
        shares=list(members.settings.weights),
        examples=members.given,
        batch_size=size,
        device="cpu",
    )
    found = {}
    for name, state in merges.items():
        net = classifier(9)
        net.load_state_dict(state)
        found[name, "none"] = panel.far(net, 0)
    return compare(found, planned, panel.examples)


@pytest.mark.parametrize("numbers", [3, 12, 1 << 22])
def test_scores_against_a_naive_loop(numbers, monkeypatch):
    monkeypatch.setattr("mergeid.basics.memory.NUMBERS", numbers)
    a, b, *nets = (classifier(s) for s in range(5))
    states = {name: net.state_dict() for name, net in zip(("plain", "mixed", "matched"), nets, strict=True)}
    found = far(members([a, b], (0.3, 0.7)), states, "mixed", 7)
    assert (found.unit, found.examples, list(found.distances)) == ("nats", 24, list(states))

    def worth(said, q):
        crosses = [-sum(float(p[k]) * np.log(float(q[k])) for k in range(5)) for p in said]
        return -np.log(0.3 * np.exp(-crosses[0]) + 0.7 * np.exp(-crosses[1]))

    for net, got in zip(nets, found.distances.values(), strict=True):
        losses = []
        for item in Pictures():
            x = item["x"][None]
            with torch.no_grad():
                said = [model(x)[0].double().softmax(0) for model in (a, b)]
                q = net(x)[0].double().softmax(0)
            own = min(worth(said, r) for r in (*said, 0.3 * said[0] + 0.7 * said[1]))
            losses.append(worth(said, q) - own)
        assert got == pytest.approx(np.mean(losses), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("size", [1, 5, 24])
def test_batches_do_not_matter(size):
    a, b = classifier(0), classifier(1)
    first, second = (
        far(members([a, b]), {"plain": noisy(a, 0.1), "mixed": noisy(a, 0.3)}, "mixed", n) for n in (size, 24)
    )
    assert first.distances["plain"] == pytest.approx(second.distances["plain"], rel=1e-6)
    assert first.chosen == second.chosen == "plain" and first.error == pytest.approx(second.error, rel=1e-5)


class Says(nn.Module):
    """The same probabilities whatever it is given."""

    def __init__(self, *probabilities):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, x):
        return self.logits.expand(len(x), -1)


def panel_of(models, shares, count=3, **how):
    """A panel of modules that are called as they are, and whose last dimension holds logits."""
    first = SimpleNamespace(
        joined=None,
        adapter=None,
        example={"x": torch.zeros(2, 1), "labels": torch.zeros(2)},
        inputs={"x": torch.zeros(2, 1)},
        inputs_of=lambda batch: {k: v for k, v in batch.items() if k != "labels"},
        model=models[0],
        loss=lambda *_: 0.0,
        forward=lambda model, batch: model(batch["x"]),
        outputs=lambda model, batch: {"output": model(batch["x"])},
        unread=frozenset(),
    )
    data = [{"x": torch.full((1,), float(i))} for i in range(count)]
    return Panel(first, models, shares=shares, examples=Examples(data), batch_size=2, device="cpu", **how)


def scores(models, nets, shares, either=True):
    """Excess of networks that say the same whatever they are given."""
    panel = panel_of(models, shares, either=either)
    found = []
    for net in nets:
        far = panel.far(net, 0)["output"]
        assert far.unit == "nats" and far.rows.shape == (1, 3)
        torch.testing.assert_close(far.rows, far.rows[:, :1].expand(-1, 3), rtol=0, atol=0, equal_nan=True)
        found.append(far.rows[0, 0].item())
    return found


def entropy(*p):
    return -sum(x * np.log(x) for x in p)


def test_where_the_models_disagree_a_merge_may_keep_to_either():
    one, two = Says(0.98, 0.01, 0.01), Says(0.01, 0.98, 0.01)
    keeps, also_keeps, between = Says(0.96, 0.03, 0.01), Says(0.03, 0.96, 0.01), Says(0.44, 0.44, 0.12)
    found = scores([one, two], [keeps, also_keeps, between], [0.5, 0.5])
    assert found[0] == pytest.approx(found[1], abs=1e-6) and found[0] < found[2] - 0.05
    # their mean asks for the one that is never right
    mean, of_keeps, of_between = (np.array(p) for p in ([0.495, 0.495, 0.01], [0.96, 0.03, 0.01], [0.44, 0.44, 0.12]))
    expected = [-mean @ np.log(of_keeps) - entropy(*mean), -mean @ np.log(of_between) - entropy(*mean)]
    assert expected[1] < expected[0] - 0.5
    assert scores([one, two], [keeps, between], [0.5, 0.5], either=False) == pytest.approx(expected, rel=1e-5)
    # a model without a share, or with a negative one, is nobody to keep to
    alone = scores([one], [keeps, also_keeps], [1.0])
    assert scores([one, two], [keeps, also_keeps], [1.0, 0.0]) == pytest.approx(alone)
    assert scores([one, two], [keeps, also_keeps], [1.5, -0.5]) == pytest.approx(alone)
    assert alone[0] < alone[1] - 1


def test_a_class_that_all_rule_out_counts_nothing():
    both, three = ([Says(*p[:n]) for p in ([0.7, 0.3, 0.0], [0.4, 0.6, 0.0], [0.2, 0.8, 0.0])] for n in (2, 3))
    for either in (True, False):
        expected = scores(both[:2], both[2:], [0.5, 0.5], either)
        assert scores(three[:2], three[2:], [0.5, 0.5], either) == pytest.approx(expected)
    # what a model holds possible must not be ruled out, and what is no number is not taken for a class
    assert scores([Says(0.5, 0.3, 0.2)], three[2:], [1.0]) == [np.inf]
    assert np.isnan(scores(three[:2], [Says(0.5, float("nan"), 0.0)], [0.5, 0.5])[0])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 4))
def test_models_that_agree_are_one_model(seed, count):
    drawn = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    model, net = (Says(*row.tolist()) for row in drawn)
    shares = np.random.default_rng(seed).dirichlet(np.ones(count)).tolist()
    p, q = drawn.double()
    found = scores([model] * count, [net, model], shares)
    assert found == pytest.approx([float(p @ (p / q).log()), 0], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("planned", ["plain", "mixed", "matched"])
def test_ties_stay_with_the_plan(planned):
    a, b = classifier(0), classifier(1)
    found = far(members([a, b]), dict.fromkeys(("plain", "mixed", "matched"), b.state_dict()), planned, 8)
    assert found.chosen == planned and found.note is None and found.error is None


@pytest.mark.parametrize("size", [1, 5, 24])
def test_rounding_is_no_reason_to_leave_the_plan(size):
    a, b = classifier(0), classifier(1)
    states = {name: noisy(b, noise) for name, noise in (("plain", 1e-7), ("mixed", 0), ("matched", 1e-6))}
    for planned in states:
        assert far(members([a, b]), states, planned, size).chosen == planned


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
            json.dumps(found.to_json(), allow_nan=False)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), noise=st.lists(st.floats(0, 0.3), min_size=3, max_size=3))
def test_no_other_merge_is_nearer_than_the_one_that_is_written(seed, noise):
    group = members([classifier(0), classifier(1)])
    order = ("plain", "mixed", "matched")
    states = {name: noisy(classifier(seed % 3), size) for name, size in zip(order, noise, strict=True)}
    found = far(group, states, order[seed % 3], 24)
    assert found.distances[found.chosen] <= min(found.distances.values()) + TIE
    if found.note is not None:
        shown = re.search(r"\((\S+) to (\S+) nats of excess", found.note)
        assert shown is not None and shown[1] != shown[2]
        gap = found.distances[found.planned] - found.distances[found.chosen]
        assert gap > TIE and f"a difference of {gap:.2g} with a standard error of {found.error:.2g}" in found.note


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)).eval()


def rows():
    return [{"arg0": x} for x in torch.randn(64, 6, generator=torch.Generator().manual_seed(3))]


def wrong_plan(monkeypatch):
    """Plans that would match everything at random."""
    honest = mergeid.stages.plan.make_plan

    def planned(*args, **kwargs):
        plan = honest(*args, **kwargs)
        return replace(plan, element=plan.graph.random_element(torch.Generator().manual_seed(5)), verdict="match")

    monkeypatch.setattr(mergeid.stages.plan, "make_plan", planned)


def printed(result):
    console = Console(width=200, record=True, file=io.StringIO())
    print_merge(result, console)
    return console.export_text()


def test_a_wrong_match_is_not_used(monkeypatch):
    a, b = network(), network()
    with torch.no_grad():
        for p in b.parameters():
            p += 0.01 * torch.randn_like(p)
    wrong_plan(monkeypatch)
    result = mergeid.merge(a, b, data=rows(), example_inputs=torch.randn(2, 6), repair="none")
    assert result.verdict == "direct" and not result.plan.moves
    assert any("matching was not used: on 64 calibration examples" in note for note in result.notes)
    assert (result.comparison["planned"], result.comparison["chosen"]) == ("mixed", "plain")
    assert result.comparison["unit"] == "relative"
    assert printed(result).startswith("Plan, overruled by the last look: ")
    for key, value in result.state.items():
        assert torch.equal(value, (a.state_dict()[key] + b.state_dict()[key]) / 2)
    how = {"data": rows(), "example_inputs": torch.randn(2, 6), "match": "always", "repair": "none"}
    with pytest.raises(WillNotMerge, match=r"even the nearest merge .mixed. is off the models' outputs by .* variance"):
        mergeid.merge(a, b, **how)
    forced = mergeid.merge(a, b, **how, force=True)
    assert list(forced.comparison["distances"]) == ["mixed"] and forced.verdict == "match"


def test_a_right_match_is_kept():
    a = network()
    graph = mergeid.graph(a, torch.randn(2, 6))
    b = network()
    b.load_state_dict(graph.apply_state(graph.random_element(torch.Generator().manual_seed(1)), b.state_dict()))
    result = mergeid.merge(a, b, data=rows(), example_inputs=torch.randn(2, 6))
    assert result.verdict == "match" and result.comparison["chosen"] == "matched" == result.comparison["planned"]
    assert result.comparison["distances"]["matched"] < 1e-6 < result.comparison["distances"]["plain"]
    assert printed(result).startswith("Verdict: ")
    for key, value in result.state.items():
        torch.testing.assert_close(value, a.state_dict()[key])


def scrambled():
    """A network, and the same with its neurons in another order."""
    a, b = network(), network()
    graph = mergeid.graph(a, torch.randn(2, 6))
    element = graph.random_element(torch.Generator().manual_seed(1))
    b.load_state_dict(graph.apply_state(element, b.state_dict()))
    return a, b


def test_a_copy_with_its_neurons_in_another_order_needs_no_repair(monkeypatch):
    """Nothing can be nearer to two equal functions than they are: no repair is tried."""
    monkeypatch.setattr(mergeid.stages.compare, "repair_network", lambda *_, **__: pytest.fail("tried a repair"))
    a, b = scrambled()
    found = mergeid.merge(a, b, data=rows(), example_inputs=torch.randn(2, 6)).comparison
    assert found["chosen"] == "matched" and found["repair"] == "none" and found["distances"]["matched"] < 1e-6


def half_a_plan(monkeypatch, moved):
    """Plans that match only the first `moved` spaces."""
    honest = mergeid.stages.plan.make_plan

    def planned(*args, **kwargs):
        plan = honest(*args, **kwargs)
        kept = {space.id: np.arange(space.size) for space in plan.graph.spaces[moved:]}
        records = [*plan.spaces[:moved], *(replace(r, decision="direct") for r in plan.spaces[moved:])]
        verdict = "match" if moved else "direct"
        return replace(plan, element={**plan.element, **kept}, spaces=records, verdict=verdict)

    monkeypatch.setattr(mergeid.stages.plan, "make_plan", planned)


@pytest.mark.parametrize("moved", [1, 0])
def test_all_spaces_are_matched_where_that_is_nearer(monkeypatch, moved):
    a, b = scrambled()
    half_a_plan(monkeypatch, moved)
    result = mergeid.merge(a, b, data=rows(), example_inputs=torch.randn(2, 6))
    assert result.verdict == "match" and result.comparison["chosen"] == "matched"
    assert result.comparison["planned"] == ("mixed" if moved else "plain")
    assert any("every space was matched: on 64 calibration examples" in note for note in result.notes)
    for key, value in result.state.items():
        torch.testing.assert_close(value, a.state_dict()[key])
    # the file that is written beside a merge names what was done
    assert set(result.plan.to_json()["permutations"]) == {s.id for s in result.plan.graph.spaces}


def test_where_the_match_moves_nothing_there_is_one_merge():
    a, b = network(), network()
    with torch.no_grad():
        for p in b.parameters():
            p += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(7))
    result = mergeid.merge(a, b, data=rows(), example_inputs=torch.randn(2, 6), repair="none")
    assert result.verdict == "direct" and list(result.comparison["distances"]) == ["plain"]


def test_the_plan_carries_the_match_of_every_space():
    a, b = scrambled()
    inputs = torch.randn(2, 6)
    plan = mergeid.plan(a, b, data=rows(), example_inputs=inputs)
    always = mergeid.plan(a, b, data=rows(), example_inputs=inputs, match="always")
    assert all(np.array_equal(plan.matched[k], always.element[k]) for k in always.element)
    assert mergeid.plan(a, b, example_inputs=inputs).matched is None
