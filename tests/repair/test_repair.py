"""BatchNorm re-estimation against torch's own training mode, a layer-by-layer oracle, and other batch sizes."""

from __future__ import annotations

import pytest
import torch
from evaluate_helpers import Items, Net, forward, net
from torch import nn
from torch.utils.data import default_collate

from mergeid.data.batches import FixedBatches
from mergeid.errors import MergeidError
from mergeid.repair import batchnorm as repair
from mergeid.repair.batchnorm import batchnorm_layers, calibration_batches, reestimate_batchnorm

F64 = torch.float64


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "running" in name}


def assert_same(found: dict, expected: dict, rel: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=rel, atol=rel, msg=lambda m, n=name: f"{n}: {m}")


def layer_by_layer(model: Net, x: torch.Tensor) -> None:
    """The definition, word for word: each layer from the eval-mode inputs that the finished layers before it give."""
    for layer in (model.bn1, model.bn2, model.bn3):
        inputs = []
        handle = layer.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
        with torch.no_grad():
            for example in x:  # one at a time: no batch anywhere
                model(example[None])
        handle.remove()
        values = torch.cat(inputs).transpose(0, 1).flatten(1).numpy()
        layer.running_mean.copy_(torch.from_numpy(values.mean(1)))
        layer.running_var.copy_(torch.from_numpy(values.var(1)))


@pytest.mark.parametrize("size", [1, 8, 17, 60, None])
def test_agrees_with_the_definition_for_every_batch_size(size):
    expected, found, data = net(1, F64), net(1, F64), Items(60)
    layer_by_layer(expected, data.x.double())
    batches = calibration_batches(found, data, forward=forward, size=size)
    changed = reestimate_batchnorm(found, batches, forward=forward)
    assert_same(statistics(found), statistics(expected))
    assert_same(changed, statistics(expected))
    assert all(changed[name].data_ptr() == found.state_dict()[name].data_ptr() for name in changed)


def test_one_batch_agrees_with_torchs_training_mode():
    expected, found, data = net(2, F64), net(2, F64), Items(64)
    for layer in batchnorm_layers(expected).values():
        layer.train()
        layer.momentum = 1.0
    with torch.no_grad():
        expected(data.x.double())
    for layer, values in zip(batchnorm_layers(expected).values(), (64 * 64, 64 * 9, 64), strict=True):
        layer.running_var *= (values - 1) / values  # torch keeps the sample variance, not the population's
    reestimate_batchnorm(found, FixedBatches(data, 64), forward=forward)
    assert_same(statistics(found), statistics(expected))


def test_float32_agrees_with_float64_for_inputs_far_from_zero():
    """Sums of squares would cancel: the mean is 1,000 times the deviation."""
    data = Items(50)
    data.x = data.x / 10 + 100
    found, expected = net(3), net(3, F64)
    reestimate_batchnorm(found, FixedBatches(data, 13), forward=forward)
    layer_by_layer(expected, data.x.double())
    assert_same({k: v.double() for k, v in statistics(found).items()}, statistics(expected), rel=1e-3)


def test_touches_nothing_but_the_statistics_and_restores_the_mode():
    model = net(4).train()
    model.bn1.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    changed = reestimate_batchnorm(model, FixedBatches(Items(20), 7), forward=forward)
    assert [module.training for module in model.modules()] == flags
    assert not any(module._forward_pre_hooks for module in model.modules())
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    assert same == set(before) - set(changed)
    assert set(changed) == {f"bn{i}.running_{kind}" for i in (1, 2, 3) for kind in ("mean", "var")}


def test_repeating_it_changes_nothing():
    model, data = net(5, F64), Items(40)
    reestimate_batchnorm(model, FixedBatches(data, 11), forward=forward)
    once = statistics(model)
    reestimate_batchnorm(model, FixedBatches(data, 7), forward=forward)
    assert_same(statistics(model), once, rel=1e-10)


@pytest.mark.parametrize("size", [1, 7, 30])
def test_a_constant_channel_keeps_its_variance(size):
    """A column that never varies on the calibration data, and may elsewhere."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.BatchNorm1d(2)).double().eval()
    model[0].running_var.copy_(torch.tensor([2.0, 3.0, 4.0]))
    x = torch.randn(30, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 5.0
    reestimate_batchnorm(model, FixedBatches([{"x": row} for row in x], size), forward=lambda m, b: m(b["x"]))
    variance = x.var(0, correction=0)
    expected = torch.tensor([variance[0], 3.0, variance[2]], dtype=F64)
    torch.testing.assert_close(model[0].running_var, expected)
    torch.testing.assert_close(model[0].running_mean, x.mean(0))
    with torch.no_grad():
        hidden = model[1](model[0](x))
    torch.testing.assert_close(model[2].running_var, hidden.var(0, correction=0), rtol=1e-9, atol=1e-9)


def test_any_iterable_of_batches_will_do():
    data = Items(30)
    whole, streamed = net(6, F64), net(6, F64)
    reestimate_batchnorm(whole, FixedBatches(data, 10), forward=forward)
    reestimate_batchnorm(
        streamed, (default_collate([data[i] for i in range(k, k + 10)]) for k in (0, 10, 20)), forward=forward
    )
    assert_same(statistics(streamed), statistics(whole), rel=1e-12)


class Shared(nn.Module):
    """One BatchNorm called twice and known under two names, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 4)
        self.bn = self.alias = nn.BatchNorm1d(4)
        self.idle = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.bn(self.second(self.bn(self.first(x))))


def test_a_shared_layer_pools_its_calls_and_an_idle_one_keeps_its_statistics():
    torch.manual_seed(0)
    model, x = Shared().double().eval(), torch.randn(30, 3, dtype=F64)
    changed = reestimate_batchnorm(model, [{"x": x[:11]}, {"x": x[11:]}], forward=forward)
    assert set(changed) == {f"{name}.running_{kind}" for name in ("bn", "alias") for kind in ("mean", "var")}
    with torch.no_grad():
        first = model.first(x)
        values = torch.cat([first, model.second(model.bn(first))])
    torch.testing.assert_close(model.bn.running_mean, values.mean(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.bn.running_var, values.var(0, correction=0), rtol=1e-9, atol=1e-9)
    assert torch.equal(model.idle.running_var, torch.ones(4, dtype=F64))


class Conv(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), norm

    def forward(self, x):
        return self.norm(self.conv(x))


def subclasses() -> list[nn.Module]:
    from timm.layers import BatchNormAct2d

    return [BatchNormAct2d(4), nn.SyncBatchNorm(4), nn.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4, affine=False)]


@pytest.mark.parametrize("norm", subclasses(), ids=lambda norm: type(norm).__name__)
def test_subclasses_are_covered(norm):
    model, data = Conv(norm).eval(), Items(20)
    changed = reestimate_batchnorm(model, FixedBatches(data, 6), forward=forward)
    with torch.no_grad():
        inputs = model.conv(data.x)
    torch.testing.assert_close(changed["norm.running_mean"], inputs.mean((0, 2, 3)))
    torch.testing.assert_close(changed["norm.running_var"], inputs.var((0, 2, 3), correction=0))


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.BatchNorm2d(4, track_running_stats=False), nn.Identity()])
def test_models_without_running_statistics_are_left_alone(norm):
    assert reestimate_batchnorm(Conv(norm), FixedBatches(Items(4), 2), forward=forward) == {}


def test_automatic_batches_keep_to_the_memory_budget(monkeypatch):
    model, data = net(0), Items(100)
    everything = calibration_batches(model, data, forward=forward)
    assert (len(everything), len(everything.dataset)) == (1, 100)
    monkeypatch.setattr(repair, "ACTIVATION_BUDGET", 10 * 6 * 8 * 8 * 4 * repair.LIVE_TENSORS)  # ten examples at bn1
    some = calibration_batches(model, data, forward=forward)
    assert (len(some), len(some.dataset)) == (1, 10)
    assert torch.equal(some[0]["x"], data.x[::10])
    assert len(calibration_batches(model, data, forward=forward, size=25)) == 4


@pytest.mark.parametrize("name", ["resnet18", "regnetx_002"])
def test_real_networks_in_several_batches_agree_with_one(name):
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, in_chans=1).double().eval()
    data = Items(24)
    data.x = data.x.repeat_interleave(4, 2).repeat_interleave(4, 3)
    before = statistics(model)
    reestimate_batchnorm(model, FixedBatches(data, 24), forward=forward)
    whole = statistics(model)
    model.load_state_dict(before, strict=False)
    reestimate_batchnorm(model, FixedBatches(data, 7), forward=forward)
    assert_same(statistics(model), whole, rel=1e-7)


def test_no_data_and_wrong_data_are_named():
    with pytest.raises(MergeidError, match="cannot be measured without data"):
        reestimate_batchnorm(net(0), [], forward=forward)
    with pytest.raises(MergeidError, match="does not fit the model"):
        reestimate_batchnorm(net(0), [{"x": torch.zeros(2, 3, 8, 8)}], forward=forward)
    with pytest.raises(MergeidError, match="calibration batch is 0"):
        FixedBatches(Items(4), 0)
