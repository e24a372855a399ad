"""REPAIR against its definition, layer by layer on whole activations, for several kinds of layers and batch sizes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from math import inf
from typing import Any

import pytest
import torch
from evaluate_helpers import forward
from torch import Tensor, nn

import mergeid
from mergeid.errors import MergeidError
from mergeid.repair.rescale import Layer, Moments, output_moments, rescalable_layers, rescale

F64 = torch.float64


class Mlp(nn.Module):
    def __init__(self, norm: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1, bias=bias)
        self.norm = nn.GroupNorm(2, 6) if norm else nn.Identity()
        self.fc1 = nn.Linear(6 * 16, 20, bias=bias)
        self.ln = nn.LayerNorm(20) if norm else nn.Identity()
        self.fc2 = nn.Linear(20, 20, bias=bias)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.ln(self.fc1(x.flatten(1))))
        return self.head(torch.relu(self.fc2(x)))


def net(seed: int, **kind: bool) -> nn.Module:
    torch.manual_seed(seed)
    return Mlp(**kind).double().eval()


def average(a: nn.Module, b: nn.Module, weight: float = 0.5) -> nn.Module:
    found = copy.deepcopy(a)
    state = {k: (1 - weight) * v + weight * b.state_dict()[k] for k, v in a.state_dict().items()}
    found.load_state_dict(state)
    return found


def data(count: int = 40) -> Tensor:
    return torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(3), dtype=F64) + 0.5


def output_of(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """Pre-activations [positions, C] of one layer on all data at once."""
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, out: found.append(out))
    with torch.no_grad():
        model(x)
    handle.remove()
    return found[0].movedim(1, -1).reshape(-1, found[0].shape[1])


HIDDEN = ("conv", "fc1", "fc2")


def targets_of(a: nn.Module, b: nn.Module, x: Tensor, weight: float) -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    for name in HIDDEN:
        u, v = (output_of(m, name, x) for m in (a, b))
        mean, std = (
            (1 - weight) * f(u) + weight * f(v) for f in (lambda t: t.mean(0), lambda t: t.std(0, correction=0))
        )
        found[name] = mean, std
    return found


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("size", [40, 13, 1])
@pytest.mark.parametrize("weight", [0.5, 0.3])
def test_every_layer_gets_the_interpolated_statistics(norm: bool, size: int, weight: float) -> None:
    a, b, x = net(0, norm=norm), net(1, norm=norm), data()
    merged = average(a, b, weight)
    targets = targets_of(a, b, x, weight)
    batches = [{"x": part} for part in x.split(size)]
    layers = rescalable_layers(merged, batches[0], forward=forward)
    assert [layer.name for layer in layers] == list(HIDDEN)
    head = merged.head.weight.clone()
    done = rescale(merged, layers, targets, batches, forward=forward)
    for name in HIDDEN:  # measured on the finished network: what comes before each layer is repaired too
        y = output_of(merged, name, x)
        torch.testing.assert_close(y.mean(0), targets[name][0], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(y.std(0, correction=0), targets[name][1], rtol=1e-8, atol=1e-9)
    assert torch.equal(merged.head.weight, head) and done.without_bias == ()
    assert done.before < 0.95 and done.after == pytest.approx(1, abs=1e-9)
    assert set(done.tensors) == {f"{n}.{kind}" for n in HIDDEN for kind in ("weight", "bias")}
    assert not any(module._forward_hooks for module in merged.modules())


def test_batch_sizes_give_one_network() -> None:
    a, b, x = net(0), net(1), data()
    targets = targets_of(a, b, x, 0.5)
    found = []
    for size in (40, 7):
        merged = average(a, b)
        batches = [{"x": part} for part in x.split(size)]
        rescale(merged, rescalable_layers(merged, batches[0], forward=forward), targets, batches, forward=forward)
        found.append(merged.state_dict())
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-9, atol=1e-10)


def test_without_a_bias_only_the_spread_is_set() -> None:
    a, b, x = net(0, norm=False, bias=False), net(1, norm=False, bias=False), data()
    merged = average(a, b)
    targets = targets_of(a, b, x, 0.5)
    layers = rescalable_layers(merged, {"x": x}, forward=forward)
    done = rescale(merged, layers, targets, [{"x": x}], forward=forward)
    assert done.without_bias == HIDDEN
    for name in HIDDEN:
        y = output_of(merged, name, x)
        torch.testing.assert_close(y.std(0, correction=0), targets[name][1], rtol=1e-8, atol=1e-9)
    one_by_one = average(a, b)
    done = rescale(one_by_one, layers, targets, [{"x": part} for part in x.split(9)], forward=forward)
    torch.testing.assert_close(one_by_one.fc2.weight, merged.fc2.weight)


def test_a_model_merged_with_itself_stays_as_it_is() -> None:
    a, x = net(0), data()
    merged = copy.deepcopy(a)
    layers = rescalable_layers(merged, {"x": x}, forward=forward)
    done = rescale(merged, layers, targets_of(a, a, x, 0.5), [{"x": x}], forward=forward)
    assert done.before == pytest.approx(1, abs=1e-12)
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, a.state_dict()[name], rtol=1e-10, atol=1e-11)


def test_constant_channels_are_not_blown_up() -> None:
    a, b, x = net(0, norm=False), net(1, norm=False), data()
    merged = average(a, b)
    with torch.no_grad():
        merged.fc1.weight[3] = 0
    done = rescale(merged, [Layer("fc1", 0, -1)], targets_of(a, b, x, 0.5), [{"x": x}], forward=forward)
    assert torch.equal(merged.fc1.weight[3], torch.zeros(96, dtype=F64)) and torch.isfinite(merged.fc1.bias).all()
    assert output_of(merged, "fc1", x)[:, 3].mean().item() == pytest.approx(
        targets_of(a, b, x, 0.5)["fc1"][0][3].item()
    )
    assert done.layers == ("fc1",)


def test_pooled_moments_are_those_of_the_whole() -> None:
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) * 1e-3 + 1e3  # float32, far from zero
    found = Moments()
    for part in x.split(37):
        found.add(part)
    torch.testing.assert_close(found.mean, x.double().mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(found.std, x.double().std(0, correction=0), rtol=1e-9, atol=0)
    assert found.count == 500


def test_what_comes_after_a_layer_does_not_run_for_its_moments() -> None:
    """Forward passes end at the layer that is measured: k batches and n layers run the last layer only where all are
    measured at once, before and after."""
    a, b = net(0), net(1)
    merged, calls = average(a, b), []
    merged.head.register_forward_hook(lambda *_: calls.append(1))
    batches = [{"x": part} for part in data().split(10)]
    layers = rescalable_layers(merged, batches[0], forward=forward)
    targets = {n: (m.mean, m.std) for n, m in output_moments(a, layers, batches, forward=forward).items()}
    calls.clear()
    rescale(merged, layers, targets, batches, forward=forward)
    assert len(layers) == 3 and len(calls) == 2 * len(batches)
    assert not any(m._forward_hooks for n, m in merged.named_modules() if n != "head")


class Odd(nn.Module):
    """A layer that is called twice, two that share a weight, one that standardises its weight, one without a call."""

    def __init__(self) -> None:
        super().__init__()
        from timm.layers import StdConv2d

        self.conv = StdConv2d(1, 4, 3, padding=1)
        self.twice = nn.Linear(4, 4)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.idle = nn.Linear(4, 4)
        self.good = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3))
        return self.head(torch.relu(self.good(self.two(self.one(self.twice(self.twice(x)))))))


def test_layers_that_cannot_be_rescaled_are_left_out() -> None:
    torch.manual_seed(0)
    model = Odd().double().eval()
    assert [layer.name for layer in rescalable_layers(model, {"x": data(4)}, forward=forward)] == ["good"]


def test_transposed_linear_layers_and_padding() -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).double().eval()
    batch = {
        "input_ids": torch.randint(50, (3, 6)),
        "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 6]),
    }

    def run(module: nn.Module, b: dict) -> Tensor:
        return module(**b, use_cache=False).logits

    layers = rescalable_layers(model, batch, forward=run)
    assert [(layer.name.rpartition(".")[2], layer.rows) for layer in layers] == [
        ("c_attn", 1), ("c_proj", 1), ("c_fc", 1), ("c_proj", 1),
    ]  # fmt: skip
    moments = output_moments(model, layers, [batch], forward=run)
    assert {m.count for m in moments.values()} == {16}
    wanted = {n: (m.mean + 1, m.std * 2) for n, m in moments.items()}
    done = rescale(model, layers, wanted, [batch], forward=run)
    after = output_moments(model, layers, [batch], forward=run)
    for name, (mean, std) in wanted.items():
        torch.testing.assert_close(after[name].mean, mean, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(after[name].std, std, rtol=1e-8, atol=1e-9)
    assert done.after == pytest.approx(1)


def test_no_data_is_named() -> None:
    with pytest.raises(MergeidError, match="REPAIR cannot measure anything without data"):
        rescale(net(0), [], {}, [], forward=forward)


# --- as a stage of a merge ---------------------------------------------------------------------------------------


def live(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(8, 32), nn.ReLU(), nn.LayerNorm(32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)]
    return nn.Sequential(*layers).eval()


def test_the_stage_is_reported() -> None:
    a, b = live(0), live(1)
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    rows = [{"arg0": x} for x in inputs]
    how = {"data": rows, "example_inputs": inputs[:2], "match": "never", "refuse_above": inf}
    plain = mergeid.merge(a, b, repair=False, **how)
    assert plain.repair is None and plain.repaired == []
    done = mergeid.merge(a, b, repair="repair", **how)
    assert done.repair is not None and done.repair["kind"] == "repair" and done.repair["layers"] == 2
    assert done.repair["spread_before"] < 0.95 and done.repair["spread_after"] == pytest.approx(1, abs=1e-5)
    assert done.repaired == ["0.bias", "0.weight", "3.bias", "3.weight"]
    merged = live(0)
    merged.load_state_dict(done.state)
    with torch.no_grad():
        spread = [m[0](inputs).std(0, correction=0) for m in (a, b, merged)]
    torch.testing.assert_close(spread[2], (spread[0] + spread[1]) / 2, rtol=1e-4, atol=1e-5)
    again = mergeid.merge(a, b, repair="repair", **{**how, "batch_size": 5})
    for name, value in done.state.items():
        assert torch.equal(value, again.state[name])
    with pytest.raises(MergeidError, match=r"'fix' is not one of auto, bn, repair, regmean, solve, solve\+lean, solve"):
        mergeid.merge(a, b, repair="fix", **how)


@pytest.mark.parametrize(
    ("weights", "first", "second"),
    [
        ((0.2, 0.3, 0.5), (0.2, 0.3, 0.5), (0.2, 0.3, 0.5)),
        ({"0.*": (0.7, 0.2, 0.1), "*": (0.1, 0.1, 0.8)}, (0.7, 0.2, 0.1), (0.1, 0.1, 0.8)),
    ],
)
def test_unequal_shares_are_those_of_the_targets(weights: Any, first: Sequence[float], second: Sequence[float]) -> None:
    """Every layer's mean and spread are the models' own, weighed as that layer's weights are."""
    models = [live(i) for i in range(3)]
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    rows = [{"arg0": x} for x in inputs]
    how = {"example_inputs": inputs[:2], "match": "never", "refuse_above": inf}
    done = mergeid.merge(models, data=rows, weights=weights, repair="repair", **how)
    merged = live(0)
    merged.load_state_dict(done.state)
    for layer, shares in (("0", first), ("3", second)):
        found = output_of(merged, layer, inputs)
        own = [output_of(m, layer, inputs) for m in models]
        for measure in (lambda t: t.mean(0), lambda t: t.std(0, correction=0)):
            expected = sum(share * measure(t) for share, t in zip(shares, own, strict=True))
            torch.testing.assert_close(measure(found), expected, rtol=1e-4, atol=1e-5)


def test_it_repairs_the_midpoint_of_two_real_networks() -> None:
    """Two MLPs from independent seeds on scikit-learn's digits, averaged as they lie."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]

    def trained(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        sizes = [64, 128, 128, 128]
        hidden = [m for i, o in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(i, o), nn.ReLU())]
        model = nn.Sequential(*hidden, nn.Linear(128, 10))
        optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(20):
            for batch in torch.randperm(len(train)).split(64):
                optimiser.zero_grad()
                nn.functional.cross_entropy(model(x[train[batch]]), y[train[batch]]).backward()
                optimiser.step()
        return model.eval()

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return (model(x[test]).argmax(1) == y[test]).float().mean().item()

    a, b = trained(1), trained(2)
    rows = [{"arg0": v} for v in x[train[:256]]]
    how = {"data": rows, "example_inputs": x[:2], "match": "never", "refuse_above": inf}
    found = {}
    for stage in ("none", "repair"):
        merged = copy.deepcopy(a)
        merged.load_state_dict(mergeid.merge(a, b, repair=stage, **how).state)
        found[stage] = accuracy(merged)
    assert min(accuracy(a), accuracy(b)) > 0.95
    assert found["none"] < 0.6 and found["repair"] > found["none"] + 0.25, found


def test_with_batchnorm_its_statistics_come_last() -> None:
    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layers = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 8), nn.ReLU()]
        net = nn.Sequential(*layers, nn.Linear(8, 3)).eval()
        with torch.no_grad():  # its statistics are those of these inputs, as a trained network's are
            z = net[0](x)
            net[1].running_mean.copy_(z.mean((0, 2, 3)))
            net[1].running_var.copy_(z.var((0, 2, 3), correction=0))
        return net

    x = data(40).float()
    a, b = model(0), model(1)
    how = {"data": [{"arg0": v} for v in x], "example_inputs": x[:2], "match": "never", "refuse_above": inf}
    done = mergeid.merge(a, b, repair="repair", **how)
    assert done.repair is not None and done.repair["kind"] == "repair+bn" and done.repair["layers"] == 2
    merged = model(0)
    merged.load_state_dict(done.state)
    with torch.no_grad():
        inputs = merged[0](x)
        spread = [m[0](x).std((0, 2, 3), correction=0) for m in (a, b, merged)]
    torch.testing.assert_close(merged[1].running_mean, inputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged[1].running_var, inputs.var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(spread[2], (spread[0] + spread[1]) / 2, rtol=1e-4, atol=1e-5)
    only = mergeid.merge(a, b, repair="bn", **how)
    assert only.repair is not None and only.repair["kind"] == "bn" and set(only.repaired) == {
        "1.running_mean", "1.running_var",
    }  # fmt: skip
