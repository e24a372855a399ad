"""What counts as near, what is refused, and that a repair is judged on inputs that it has not seen."""

from __future__ import annotations

import copy
from math import inf
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluate_helpers import runs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mergeid
import mergeid.stages.compare
from mergeid.errors import MergeidError, WillNotMerge
from mergeid.evaluate.nearness import EXAMPLES, Far, Panel, joined
from mergeid.models.examples import Examples
from mergeid.stages.compare import Comparison, Distance, compare


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def panel(models, data, *, classes=False, shares=None, **how):
    """A panel of functions of ``batch["x"]``; `classes`: the first output holds logits."""
    modules = [Calls(f) for f in models]
    first = runs(modules[0], data, classes, lambda model, batch: named(model(batch["x"])))
    rows = [{"x": x} for x in data]
    told = {"shares": shares or [1 / len(models)] * len(models), "batch_size": 7, **how}
    return Panel(first, modules, examples=Examples(rows), device="cpu", **told)


def named(out):
    return out if isinstance(out, dict) else {"output": out}


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.unused = function, nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.function(x)


def far(of, function):
    net = Calls(function)
    return joined([of.far(net, part) for part in range(len(of.parts))])


# -- outputs that are no classification --------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_relative_distance_against_numpy(seed):
    x, w, v = (torch.randn(n, m, generator=seeded(3 * seed + k)) for k, (n, m) in enumerate([(40, 5), (5, 3), (5, 3)]))
    found = far(panel([lambda x: x @ w, lambda x: x @ v], x, shares=[0.3, 0.7]), lambda x: (x @ w).tanh())["output"]
    one, two, net = ((x @ w).numpy(), (x @ v).numpy(), (x @ w).tanh().numpy())
    expected = []
    for target in (0.3 * one + 0.7 * two, one, two):
        expected.append(((net - target) ** 2).mean() / target.var(0).mean())
    if (0.3 * one + 0.7 * two).var(0).mean() <= 0.09 * one.var(0).mean() + 0.49 * two.var(0).mean():
        expected[0] = inf  # networks that do not vary together have no mean
    assert found.unit == "relative" and found.distance == pytest.approx(min(expected), rel=1e-5)
    assert found.rows.mean(1).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_a_network_that_always_says_the_same_is_far(offset):
    """Whatever the outputs' own size: each position counts about its own mean."""
    x = torch.randn(64, 4, generator=seeded(0))
    about = offset * torch.arange(4)
    for models in ([lambda x: x + about], [lambda x: x + about, lambda x: x.flip(1) + about]):
        mean = sum(m(x) for m in models).mean(0) / len(models)
        assert far(panel(models, x), lambda x, m=mean: m.expand(len(x), -1))["output"].distance > 0.99
        assert far(panel(models, x), models[0])["output"].distance < 1e-9


@pytest.mark.parametrize("size", [1, 7, 40])
def test_batches_do_not_matter(size):
    x = torch.randn(40, 2, 3, 3, generator=seeded(0))
    models = [lambda x: {"maps": x, "sum": x.sum((1, 2, 3))}, lambda x: {"maps": x.flip(1), "sum": x.mean((1, 2, 3))}]
    net = lambda x: {"maps": x + 0.3 * x.sin(), "sum": x[:, 0, 0, 0]}  # noqa: E731
    whole, other = (far(panel(models, x, batch_size=n), net) for n in (40, size))
    assert set(whole) == {"maps", "sum"}
    for name, one in whole.items():
        torch.testing.assert_close(other[name].rows, one.rows, rtol=1e-5, atol=1e-9)


def test_outputs_that_do_not_vary_count_by_their_rounding():
    x = torch.randn(20, 3, generator=seeded(0))
    constant = torch.tensor([3.0, -2.0])
    of = panel([lambda x: constant.expand(len(x), -1)], x)
    assert far(of, lambda x: constant.expand(len(x), -1) * (1 + 1e-6))["output"].distance < 1e-3
    assert far(of, lambda x: constant.expand(len(x), -1) * 1.5)["output"].distance > 1e3


def test_what_is_infinite_everywhere_is_no_difference():
    mask = torch.tensor([0.0, -inf, 0.0])
    x = torch.randn(20, 3, generator=seeded(0))
    of = panel([lambda x: x + mask], x)
    assert far(of, lambda x: x + mask)["output"].distance == 0
    assert far(of, lambda x: 0 * x + mask)["output"].distance == pytest.approx(1, abs=0.2)
    assert far(of, lambda x: x)["output"].distance == inf
    assert far(of, lambda x: x * float("nan"))["output"].distance == inf


def test_sequences_of_unequal_length_and_their_padding():
    """What stands on padding counts nothing, neither for the distance nor for the variance."""
    rows = [{"x": torch.randn(n, 3, generator=seeded(n))} for n in (2, 5, 3, 4, 2, 6)]

    def collate(items):
        most = max(len(i["x"]) for i in items)
        x, mask = torch.zeros(len(items), most, 3), torch.zeros(len(items), most)
        for k, item in enumerate(items):
            x[k, : len(item["x"])], mask[k, : len(item["x"])] = item["x"], 1
        return {"x": x, "attention_mask": mask}

    model, net = Calls(lambda x: x), Calls(lambda x: torch.where(x == 0, 1e6, 0.5 * x))
    first = SimpleNamespace(
        adapter=None,
        joined=None,
        unread=frozenset(),
        example=rows[0],
        model=model,
        outputs=lambda m, b: {"output": m(b["x"])},
    )
    how = {"shares": [1.0], "examples": Examples(rows, collate), "device": "cpu"}
    values = torch.cat([r["x"] for r in rows])
    expected = [float(0.25 * r["x"].square().mean()) for r in rows]
    for size in (1, 2, 6):
        found = Panel(first, [model], batch_size=size, **how).far(net, 0)["output"]
        assert found.distance == pytest.approx(np.mean(expected) / float(values.var(0, correction=0).mean()), rel=1e-5)


# -- several outputs -----------------------------------------------------------------------------------------


def test_a_ruined_second_head_is_seen():
    x = torch.randn(60, 4, generator=seeded(0))
    model = lambda x: {"logits": 3 * x, "boxes": x[:, :2]}  # noqa: E731
    ruined = lambda x: {"logits": 3 * x, "boxes": 0 * x[:, :2]}  # noqa: E731
    of = panel([model, model], x, classes=True)
    found = compare({("plain", "none"): far(of, ruined)}, "plain", of.examples)
    assert {n: d.unit for n, d in found.outputs.items()} == {"logits": "nats", "boxes": "relative"}
    assert found.outputs["logits"].value == pytest.approx(0, abs=1e-9) and found.outputs["boxes"].value > 0.9
    assert found.unit == "both" and "by its output 'boxes'" in found.refused(0.5)
    both = {("plain", "none"): far(of, ruined), ("matched", "none"): far(of, model)}
    assert compare(both, "plain", of.examples).chosen == "matched"


# -- held out ------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 40), parts=st.integers(1, 5))
def test_parts_share_out_the_examples_and_none_judges_what_it_was_fitted_on(count, parts):
    of = panel([lambda x: x], torch.arange(count, dtype=torch.float32)[:, None], parts=parts)
    judged = [i for part in of.parts for i in part]
    assert sorted(judged) == list(range(count))
    for k, part in enumerate(of.parts):
        held = of.rest(k).items
        rest = {int(held[i]["x"]) for i in range(len(held))}
        if len(of.parts) == 1:
            assert rest == set(range(count))
        else:
            assert rest == set(range(count)) - set(part)


def test_no_more_than_a_limit_is_run():
    seen = []
    of = panel([lambda x: seen.append(len(x)) or x], torch.randn(3 * EXAMPLES, 1), parts=4)
    assert of.examples == EXAMPLES and sum(seen) <= EXAMPLES + 2
    far(of, lambda x: x)
    assert sum(seen) <= EXAMPLES + 2  # the models are not run again


def test_models_are_run_again_where_their_outputs_are_too_large_to_keep(monkeypatch):
    x = torch.randn(30, 2, generator=seeded(0))
    kept = far(panel([lambda x: x], x, parts=2), lambda x: x.sin())["output"].rows
    monkeypatch.setattr("mergeid.evaluate.nearness.KEPT", 100)
    assert torch.equal(far(panel([lambda x: x], x, parts=2), lambda x: x.sin())["output"].rows, kept)


class Normed(nn.Module):
    def __init__(self, seed, width=16):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))
        self.eval()

    def forward(self, x):
        return self.body(x)


def data(count, seed=3, scale=1.0):
    return [{"arg0": scale * x} for x in torch.randn(count, 6, generator=seeded(seed))]


def test_a_merge_with_itself_keeps_its_statistics():
    """Whatever the inputs say of the model itself: nothing was averaged."""
    a = Normed(0)
    result = mergeid.merge(a, copy.deepcopy(a), data=data(24), example_inputs=torch.randn(2, 6))
    assert result.comparison["repair"] == "none" and result.repair is None
    assert result.comparison["distance"] == 0 and set(result.comparison["distances"]) == {"plain"}
    for key, value in result.state.items():
        assert torch.equal(value, a.state_dict()[key])


def test_statistics_that_do_not_fit_the_merge_are_estimated_again():
    """B's hidden units are A's with the sign turned in pairs: their average has other statistics."""
    a, b = Normed(0), Normed(0)
    with torch.no_grad():
        for net in (a, b):
            x = torch.stack([d["arg0"] for d in data(2000, 9)])
            h = net.body[0](x)
            net.body[1].running_mean.copy_(h.mean(0)), net.body[1].running_var.copy_(h.var(0))
        b.body[0].weight.mul_(5)
        b.body[0].bias.mul_(5)
        b.body[1].running_mean.mul_(5)
        b.body[1].running_var.mul_(25)
    how = {"data": data(400), "example_inputs": torch.randn(2, 6), "match": "never"}
    result = mergeid.merge(a, b, **how, repair="bn")
    # 13 = (1 + 25) / 2, but the average's activations have 9 times the variance
    assert result.comparison["repair"] == "bn" and result.repair["examples"] == 400
    found = mergeid.merge(a, b, **how).comparison
    plain, estimated = (found["distances"][k] for k in ("plain", "plain+bn"))
    assert found["distance"] <= estimated < plain / 2 and found["repair"] in ("bn", "solve")
    named = mergeid.merge(a, b, data=data(400), example_inputs=torch.randn(2, 6), match="never", repair="none")
    assert named.repair is None and list(named.comparison["distances"]) == ["plain"]


# -- refused -------------------------------------------------------------------------------------------------


def test_the_threshold_is_the_last_distance_that_is_written():
    one = Comparison({"plain": 0.5}, "plain", "plain", "none", {"output": Distance(0.5, "nats")}, 10)
    assert one.refused(0.5) is None and one.refused(inf) is None
    assert "0.500 nats" in one.refused(0.4999) and "--refuse-above is 0.4999" in one.refused(0.4999)
    lost = Comparison({"plain": inf}, "plain", "plain", "none", {"output": Distance(inf, "nats")}, 10)
    assert lost.refused(1e9) is not None and lost.refused(inf) is None
    assert lost.to_json()["distance"] is None


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(0, 2) | st.just(inf), min_size=4, max_size=4),
    planned=st.sampled_from(["plain", "matched"]),
)
def test_the_nearest_is_chosen_and_ties_stay_with_the_simplest(values, planned):
    keys = [(merge, repair) for merge in ("plain", "matched") for repair in ("none", "bn")]
    known = dict(zip(keys, values, strict=True))
    rows = {k: {"output": Far("nats", torch.full((1, 3), v, dtype=torch.float64))} for k, v in known.items()}
    found = compare(rows, planned, 3)
    got, least = known[found.chosen, found.repair], min(values)
    assert got <= least + mergeid.stages.compare.TIE
    for merge, repair in keys:
        if repair == found.repair and merge == planned and found.chosen != planned:
            assert known[merge, repair] > least + mergeid.stages.compare.TIE
    kept, again = (min(known[m, r] for m in ("plain", "matched")) for r in ("none", "bn"))
    if found.repair == "bn":
        assert not kept <= again
    elif again != inf and abs(kept - again) > 2 * mergeid.stages.compare.TIE:
        assert kept < again


@pytest.mark.parametrize(
    ("gap", "noise", "repair"), [(0.1, 0.5, "bn"), (0.1, 0.05, "none"), (-0.1, 0.5, "bn"), (5e-5, 0, "none")]
)
def test_averaged_statistics_stay_only_where_they_are_nearer_beyond_doubt(gap, noise, repair):
    """Estimated again, the merge is farther by `gap`, with a standard error of `noise`/√24."""
    wave = torch.tensor([[1.0, -1.0] * 12], dtype=torch.float64)
    rows = {"none": torch.full_like(wave, 0.2), "bn": 0.2 + gap + noise * wave}
    found = compare({("plain", r): {"output": Far("nats", v)} for r, v in rows.items()}, "plain", 24)
    assert found.repair == repair


def head(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)).eval()


@pytest.mark.parametrize("match", ["auto", "always", "never"])
def test_a_merge_that_is_too_far_is_refused_and_nothing_is_written(match, tmp_path):
    out = tmp_path / "m.safetensors"
    how = {"data": data(64), "example_inputs": torch.randn(2, 6), "match": match, "output": out}
    written = mergeid.merge(head(0), head(1), **how, refuse_above=inf)
    distance = written.comparison["distance"]
    for file in written.files:
        file.unlink()
    assert distance > 1e-3 and not any("--force" in note for note in written.notes)
    low, high = np.nextafter(distance, 0), float(distance)
    with pytest.raises(WillNotMerge, match=r"even the nearest merge .*--refuse-above is .*nothing was written"):
        mergeid.merge(head(0), head(1), **how, refuse_above=low)
    assert list(tmp_path.iterdir()) == []
    mergeid.merge(head(0), head(1), **how, refuse_above=high)
    forced = mergeid.merge(head(0), head(1), **how, refuse_above=low, force=True)
    assert any("written anyway, as requested by --force" in note for note in forced.notes) and out.exists()


@pytest.mark.parametrize("value", [-1, float("nan"), "0.5", True])
def test_a_threshold_that_is_none(value):
    with pytest.raises(MergeidError, match=r"refuse.above is .*expected (0 or more|a number)"):
        mergeid.merge(head(0), head(1), data=data(20), example_inputs=torch.randn(2, 6), refuse_above=value)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 4), sharp=st.floats(0, 30))
def test_a_model_is_at_no_distance_from_itself_whatever_it_doubts(seed, count, sharp):
    x = torch.randn(30, 5, generator=seeded(seed))
    model = lambda x: sharp * x  # noqa: E731
    found = far(panel([model] * count, x, classes=True), model)["output"].distance
    assert found == pytest.approx(0, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), sharp=st.floats(0, 30))
def test_who_keeps_to_either_is_near_whatever_the_models_disagree_about(seed, sharp):
    """On every input another model's prediction, or their mean: no excess."""
    x = torch.randn(30, 5, generator=seeded(seed))
    models = [lambda x: sharp * x, lambda x: sharp * x.flip(1)]
    picks = torch.rand(30, generator=seeded(seed + 1)) < 0.5
    table = {tuple(row.tolist()): bool(p) for row, p in zip(x, picks, strict=True)}

    def either(x):
        chosen = torch.tensor([table[tuple(r.tolist())] for r in x])
        return torch.where(chosen[:, None], models[0](x), models[1](x))

    of = panel(models, x, classes=True)
    mean = lambda x: sum(m(x).double().softmax(-1) for m in models).log()  # noqa: E731
    assert abs(far(of, mean)["output"].distance) <= np.log(2) + 1e-6
    # the one that is less at odds with the other is worth more, so that keeping to the other may cost something
    assert far(of, either)["output"].distance <= float(np.log(2)) + 1e-6


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.ReLU())
        self.first, self.second = nn.Linear(16, 3), nn.Linear(16, 2)
        self.eval()

    def forward(self, x):
        h = self.trunk(x)
        return {"first": self.first(h), "second": self.second(h)}


def test_a_merge_that_ruins_one_of_two_heads_is_refused():
    a, b = TwoHeads(), TwoHeads()
    with torch.no_grad():
        b.second.weight.neg_(), b.second.bias.neg_()
    how = {"data": data(64), "example_inputs": torch.randn(2, 6), "match": "never", "repair": "none"}
    with pytest.raises(
        WillNotMerge, match=r"by its output 'second' off the models' outputs by 1\.\d+ of their variance"
    ):
        mergeid.merge(a, b, **how)
    done = mergeid.merge(a, b, **how, refuse_above=inf)
    found = {name: out["distance"] for name, out in done.comparison["outputs"].items()}
    assert found["first"] == 0 and found["second"] >= 1
    # who does not care for the second head says so
    assert mergeid.merge(a, b, **how, outputs=["first"]).comparison["distance"] == 0
