"""The stage that repairs: what it says it did is what can be measured on the merged network by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import mergeid
import mergeid.stages.match as matching
from mergeid.combine.in_place import in_place
from mergeid.errors import MergeidError, NoModel, WillNotMerge
from mergeid.io.opening import open_checkpoint
from mergeid.io.schema import validated
from mergeid.io.written import PlanFile
from mergeid.methods.registry import get_method
from mergeid.methods.settings import MethodRequest
from mergeid.models.examples import Examples
from mergeid.repair.layers import Layer
from mergeid.repair.solve import _by_channel
from mergeid.request.request import Calibration, Matching, Output, Run
from mergeid.stages.in_place import Places, seen_in_files
from mergeid.stages.members import Member, Members
from mergeid.stages.repair import repair_merged
from mergeid.verbs.load import load

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, seed: int, norm: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two, self.three = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        said: Tensor = self.three(self.two(self.norm(self.one(x)).relu()).relu())
        return said


def settled(net: nn.Module) -> nn.Module:
    """With the statistics that its training would have left, on inputs like X."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        net.train()(X)
    return net.eval()


def members_of(nets: Sequence[nn.Module], rows: Tensor = X) -> Members:
    models = [Member(load(net.eval(), example_inputs=X[:2])) for net in nets]
    settings = MethodRequest(get_method("linear")).over(len(nets), list(nets[0].state_dict()))
    return Members(models, None, settings, Examples([{"arg0": row} for row in rows]))


def merged_with(members: Members, tensors: dict[str, Tensor]) -> Any:
    net = copy.deepcopy(members.first.model)
    net.load_state_dict({**members.merged_state(), **tensors})
    return net


def hidden(net: Any) -> tuple[Tensor, Tensor]:
    """What both hidden layers answer, double."""
    with torch.no_grad():
        one = net.one(X)
        return one.double(), net.two(net.norm(one).relu()).double()


def test_rescaled_layers_answer_with_the_models_means_and_deviations() -> None:
    nets = [Net(k, norm=False) for k in range(2)]
    members = members_of(nets)
    done = repair_merged(members, mode="repair")
    plain, repaired = hidden(merged_with(members, {})), hidden(merged_with(members, done.tensors))
    ratios: tuple[list[Tensor], list[Tensor]] = ([], [])
    for k, answers in enumerate(zip(*map(hidden, nets), strict=True)):
        std = torch.stack([a.std(0, correction=0) for a in answers]).mean(0)
        torch.testing.assert_close(repaired[k].std(0, correction=0), std, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            repaired[k].mean(0), torch.stack([a.mean(0) for a in answers]).mean(0), rtol=1e-3, atol=1e-3
        )
        ratios[0].append(plain[k].std(0, correction=0) / std)
        ratios[1].append(repaired[k].std(0, correction=0) / std)
    told = done.to_json()
    assert told is not None and (told["kind"], told["layers"], told["examples"]) == ("repair", 2, len(X))
    assert told["spread_before"] == pytest.approx(float(torch.cat(ratios[0]).median()), rel=1e-3)
    assert told["spread_after"] == pytest.approx(float(torch.cat(ratios[1]).median()), rel=1e-3)


@pytest.mark.parametrize(("mode", "kind"), [("bn", "bn"), ("repair", "repair+bn"), ("none", "")])
def test_statistics_of_norms_are_those_of_the_merged_network(mode: str, kind: str) -> None:
    members = members_of([settled(Net(k, norm=True)) for k in range(2)])
    done = repair_merged(members, mode=mode)
    assert done.kind == kind and (done.to_json() is None) == (mode == "none")
    if mode == "none":
        assert not done.tensors
        return
    net = merged_with(members, done.tensors)
    one = hidden(net)[0]
    rel = 0.2 if mode == "bn" else 1e-3  # shrunk towards what was averaged, where that says something
    torch.testing.assert_close(net.norm.running_mean.double(), one.mean(0), rtol=rel, atol=rel)
    if mode == "bn":
        assert (done.layers, done.examples, done.after) == (1, len(X), 1.0)
        assert set(done.tensors) == {"norm.running_mean", "norm.running_var"}


@pytest.mark.parametrize("seed", range(3))
def test_inputs_of_another_kind_leave_a_model_its_own_statistics(seed: int) -> None:
    net = settled(Net(seed, norm=True))
    other = 3 * X[:, [2, 0, 3, 1]] - 2
    done = repair_merged(members_of([net, copy.deepcopy(net)], other), mode="bn")
    found = {**net.state_dict(), **done.tensors}
    for key in ("norm.running_mean", "norm.running_var"):
        torch.testing.assert_close(found[key], net.state_dict()[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_statistics_from_inputs_of_another_kind_come_nearer_to_those_of_the_own(seed: int) -> None:
    nets = [settled(Net(2 * seed + k, norm=True)) for k in range(2)]
    right = hidden(merged_with(members_of(nets), {}))[0]
    other = 2 * X + torch.tensor([1.0, -1.0, 0.5, 0.0])
    found = repair_merged(members_of(nets, other), mode="bn").tensors["norm.running_var"].log()
    with torch.no_grad():
        measured = merged_with(members_of(nets), {}).one(other).var(0).log()
    off, as_measured = ((v - right.var(0).log()).abs().mean() for v in (found, measured))
    assert off < as_measured / 4


def test_a_polish_leaves_what_is_skipped_and_brings_the_rest_nearer() -> None:
    members = members_of([Net(k, norm=False) for k in range(2)])
    done = repair_merged(members, mode="solve+polish", skip=["two.*"])
    assert done.kind == "solve+polish" and done.examples == len(X)
    assert done.tensors and not any(name.startswith("two.") for name in done.tensors)
    assert done.polished is not None and done.polished[1] <= done.polished[0]


def test_a_norm_behind_one_place_alone_is_none_of_a_channel() -> None:
    """A layer of 9 places: what it is multiplied by is one value a channel at all of them, or it is not."""

    def layer(values: Tensor) -> Layer:
        part = cast(Any, SimpleNamespace())
        rows: Callable[..., Any] = lambda p, y, at: y if at is None else y[:, at]  # noqa: E731
        return Layer([part], values.shape[1], rows, rows, values)

    even = torch.tensor([2.0, 3.0]).expand(4, 9, 2).clone()
    found = _by_channel(layer(even), even)
    assert found is not None and found.tolist() == [2.0, 3.0]
    for place in (0, 8):
        odd = even.clone()
        odd[:, place, 1] = 4
        assert _by_channel(layer(odd), odd) is None


# -- match --------------------------------------------------------------------------------------------------


def planned(monkeypatch: pytest.MonkeyPatch, mode: str, force: bool = False, **how: Any) -> Any:
    def pair_of(*_: object) -> Any:
        if "error" in how:
            raise NoModel("no architecture is known")
        one, two = SimpleNamespace(source="a"), SimpleNamespace(source="b")
        return SimpleNamespace(a=one, b=two)

    plan = SimpleNamespace(verdict=how.get("verdict"), notes=["they have nothing in common"])
    monkeypatch.setattr(matching, "pair_of", pair_of)
    monkeypatch.setattr(matching, "plan_of", lambda *_: plan)
    bench = SimpleNamespace(examples=lambda *_: None, run=Run())
    met = cast(Any, SimpleNamespace(bench=bench, everyone=["a", "b"], base=None, joined=None))
    settings = MethodRequest(get_method("linear")).over(2, ["w"])
    return matching.planned_members(met, settings, Matching(mode), Calibration(), Output(None, force=force))


def test_where_no_model_can_be_built_a_plain_merge_is_named_if_it_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoModel, match="--match never, which builds no model"):
        planned(monkeypatch, "auto", error=True)
    with pytest.raises(NoModel) as told:
        planned(monkeypatch, "always", error=True)
    assert "--match never" not in str(told.value)


def test_a_plan_that_says_no_ends_the_merge_unless_it_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WillNotMerge, match="nothing in common; nothing was written"):
        planned(monkeypatch, "auto", verdict="will not merge")
    assert len(planned(monkeypatch, "auto", True, verdict="will not merge").models) == 2
    assert len(planned(monkeypatch, "auto", verdict="match").plans) == 1


def test_rows_that_lie_in_place_leave_nothing_to_match() -> None:
    base = Net(0, norm=False)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    names = list(base.state_dict())
    for other, mode in ((tuned, "never"), (Net(1, norm=False), "auto")):
        models = [open_checkpoint(net) for net in (base, other)]
        bench = SimpleNamespace(run=Run())
        agreed = SimpleNamespace(models=models, base=None)
        met = cast(Any, SimpleNamespace(agreed=agreed, everyone=models, float_names=names, bench=bench))
        how, notes, places = seen_in_files(met, Matching("auto"))
        assert how.mode == mode and bool(notes) == (mode == "never") and isinstance(places, Places)
        assert places.all_fit == in_place(models[0], models[1], names, 0).whole == (mode == "never")


def test_a_plan_says_what_solving_would_change() -> None:
    """Layer by layer what the merge itself finds; the decisions are those of a plan that was not asked."""
    nets = [Net(seed, norm=False) for seed in (0, 1)]
    how: dict[str, Any] = {"data": [{"arg0": row} for row in X], "example_inputs": X[:2], "match": "always"}
    plain, asked = mergeid.plan(*nets, **how), mergeid.plan(*nets, **how, solve=True)
    assert not plain.solved and [s.weights[0].split(".")[0] for s in asked.solved] == ["one", "two", "three"]
    assert asked.to_json() == plain.to_json() | {"solved": asked.to_json()["solved"]}
    read = validated(PlanFile, json.loads(json.dumps(asked.to_json())), "plan")
    assert read.solved[0].error_before == asked.solved[0].before
    made = mergeid.merge(*nets, **how, repair="solve", force=True)
    assert made.repair is not None and made.state is not None
    assert made.repair["error_before"] == pytest.approx(sum(s.before for s in asked.solved) / 3)
    assert made.repair["error_after"] == pytest.approx(sum(s.after for s in asked.solved) / 3)
    with pytest.raises(MergeidError, match="give some with --data"):
        mergeid.plan(*nets, example_inputs=X[:2], solve=True)


@pytest.mark.parametrize("norm", [False, True])
def test_regmean_as_a_repair_is_the_method_of_that_name(norm: bool) -> None:
    members = members_of([settled(Net(0, norm)), settled(Net(1, norm))])
    done = repair_merged(members, mode="regmean")
    asked = MethodRequest(get_method("regmean")).over(2, list(members.first.state()))
    expected = Members(members.models, None, asked, members.examples).measured(Run()).merged_state()
    found = merged_with(members, done.tensors).state_dict()
    for key, value in expected.items():
        if not key.startswith("norm.running"):
            torch.testing.assert_close(found[key], value)
    said = done.to_json()
    assert said is not None and said["kind"] == "regmean" and said["layers"] == 3 and said["examples"] == len(X)
    if norm:  # whose statistics are those of the merged network
        inputs = merged_with(members, done.tensors).one(X)
        torch.testing.assert_close(found["norm.running_mean"], inputs.mean(0), atol=0.1, rtol=0.1)
