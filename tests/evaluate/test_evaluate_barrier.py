"""The barrier curve: exact ends, exact zero, an independent loop, resuming."""

from __future__ import annotations

import json
import math

import pytest
import torch
from curves import barrier_curve
from evaluate_helpers import CLASSES, Items, Net, forward, loss, net, reversed_neurons
from torch import nn
from torch.nn import functional as F

from mergeid.errors import MergeidError
from mergeid.evaluate.interpolate import between
from mergeid.evaluate.measure import evaluate
from mergeid.repair.batchnorm import reestimate_batchnorm
from mergeid.results.barrier import BarrierResult

DATA, CALIBRATION = Items(70), Items(40, seed=1)
TASK = {"forward": forward, "loss": loss}


def curve(a: Net, b: Net, **options) -> BarrierResult:
    return barrier_curve(a.state_dict(), b.state_dict(), Net(), DATA, **{**TASK, **options})


REPAIRED = {"repair": True, "calibration": CALIBRATION}


@pytest.mark.parametrize(
    "options",
    [{}, REPAIRED, {"dtype": torch.float64}, {"mixed_precision": "bf16"}, {**REPAIRED, "calibration_batch": 7}],
)
def test_a_pair_with_itself_has_barrier_zero(options):
    found = curve(net(0), net(0), **options)
    assert found.barrier == 0 and found.barrier_lambda is None
    assert found.barrier_accuracy == 0
    assert len(set(found.losses)) == 1 and len(found.losses) == 11


def test_the_ends_are_the_models_own_losses():
    a, b = net(1), net(2)
    own = [evaluate(model, DATA, **TASK) for model in (a, b)]
    found = curve(a, b)
    assert [found.losses[0], found.losses[-1]] == [metrics.loss for metrics in own]
    assert [found.accuracies[0], found.accuracies[-1]] == [metrics.accuracy for metrics in own]
    repaired = curve(a, b, **REPAIRED)
    for model, end in ((a, 0), (b, -1)):
        reestimate_batchnorm(model, [{"x": CALIBRATION.x}], forward=forward)
        assert repaired.losses[end] == evaluate(model, DATA, **TASK).loss
    assert repaired.calibration == len(CALIBRATION)


@pytest.mark.parametrize("repair", [False, True])
def test_agrees_with_a_plain_loop(repair):
    """Interpolation, training-mode statistics, loss and barrier written out with torch alone."""
    a, model, data = net(1, torch.float64), Net().double(), Items(70)
    b = reversed_neurons(a)
    torch.testing.assert_close(a(data.x.double()), b(data.x.double()))
    data.labels = a(data.x.double()).argmax(1)  # so that both ends are good
    grid, losses = [0, 0.3, 0.6, 1], []
    for x in grid:
        pairs = zip(a.state_dict().items(), b.state_dict().values(), strict=True)
        model.load_state_dict({k: (1 - x) * u + x * v if u.is_floating_point() else u for (k, u), v in pairs})
        with torch.no_grad():
            if repair:
                layers = (model.bn1, model.bn2, model.bn3)
                for layer in layers:
                    layer.train().momentum = 1.0
                model.drop.eval()
                model(CALIBRATION.x.double())
                for layer, values in zip(layers, (40 * 64, 40 * 9, 40), strict=True):
                    layer.running_var *= (values - 1) / values
            losses.append(F.cross_entropy(model.eval()(data.x.double()), data.labels).item())
    barrier = max(0, *(l - ((1 - x) * losses[0] + x * losses[-1]) for x, l in zip(grid, losses, strict=True)))
    options = {**TASK, **(REPAIRED if repair else {})}
    found = barrier_curve(a.state_dict(), b.state_dict(), Net(), data, lambdas=grid, dtype=torch.float64, **options)
    assert found.losses == pytest.approx(losses, rel=1e-10)
    assert found.barrier == pytest.approx(barrier, rel=1e-9) and barrier > 0


def test_batch_sizes_do_not_show_in_float64():
    first = curve(net(1), net(2), dtype=torch.float64, batch_size=64, **REPAIRED)
    other = curve(net(1), net(2), dtype=torch.float64, batch_size=3, calibration_batch=9, **REPAIRED)
    assert other.losses == pytest.approx(first.losses, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_interpolation_is_exact_at_the_ends_and_between_equals(dtype):
    torch.manual_seed(0)
    a, b = torch.randn(2, 999).to(dtype)
    cpu = torch.device("cpu")
    assert torch.equal(between(a, b, 0.0, cpu), a) and torch.equal(between(a, b, 1.0, cpu), b)
    for x in torch.rand(20).tolist():
        assert torch.equal(between(a, a, x, cpu), a)
        exact = (1 - x) * a.double() + x * b.double()
        torch.testing.assert_close(between(a, b, x, cpu), exact.to(dtype))
    assert between(a, b.double(), 0.5, cpu).dtype == torch.float64


def test_integer_buffers_come_from_a():
    a, b, seen = net(1), net(2), []
    a.bn1.num_batches_tracked.fill_(5)
    b.bn1.num_batches_tracked.fill_(9)

    def watched(model, batch):
        seen.append(model.bn1.num_batches_tracked.item())
        return forward(model, batch)

    curve(a, b, forward=watched)
    assert set(seen) == {5}


def test_leaves_the_given_model_alone_unless_told():
    a, b, model = net(1), net(2), net(3).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    barrier_curve(a.state_dict(), b.state_dict(), model, DATA, dtype=torch.float64, **TASK)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training
    barrier_curve(a.state_dict(), b.state_dict(), model, DATA, inplace=True, **TASK)
    assert torch.equal(model.head.weight, b.head.weight)


def test_tied_tensors_may_be_given_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x.flatten(1)))

    state = {name: tensor for name, tensor in Tied().state_dict().items() if name != "second.weight"}
    assert barrier_curve(state, state, Tied(), DATA, **TASK).barrier == 0
    del state["second.bias"]
    with pytest.raises(MergeidError, match=r"first state lacks 'second.bias'"):
        barrier_curve(state, state, Tied(), DATA, **TASK)


def test_resuming_skips_what_is_there(tmp_path):
    file, evaluated = tmp_path / "points.json", []

    def watched(model, batch):
        evaluated.append(len(batch["labels"]))
        return forward(model, batch)

    options = {"resume": file, "batch_size": 70, "forward": watched}

    def stop(x, metrics):
        if x == 0.3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        curve(net(1), net(2), progress=stop, **options)
    assert len(evaluated) == 4
    whole = curve(net(1), net(2), **options)
    assert len(evaluated) == 11
    again = curve(net(1), net(2), lambdas=(0, 0.2, 1), **options)
    assert len(evaluated) == 11
    assert again.losses == (whole.losses[0], whole.losses[2], whole.losses[-1])
    assert whole == curve(net(1), net(2), forward=watched)
    assert [path.name for path in tmp_path.iterdir()] == ["points.json"]  # nothing half written

    evaluated.clear()  # other inputs find nothing there, and leave what is there alone
    curve(net(1), net(3), **options)
    curve(net(1), net(2), **REPAIRED, **options)
    curve(net(1), net(2), dtype=torch.float64, **options)
    barrier_curve(net(1).state_dict(), net(2).state_dict(), Net(), Items(69), loss=loss, **options)
    assert len(evaluated) == 44 + 12  # the repair runs the model to measure, and once to choose its batch
    assert len(json.loads(file.read_text())["curves"]) == 5


def test_a_file_of_something_else_is_not_resumed_from(tmp_path):
    file = tmp_path / "other.json"
    for content in ("{}", "no json", "[1]"):
        file.write_text(content)
        with pytest.raises(MergeidError, match=r"other.json contains no barrier points"):
            curve(net(1), net(2), resume=file)
        assert file.read_text() == content
    with pytest.raises(MergeidError, match="cannot be"):
        curve(net(1), net(2), resume=file / "below.json")


def test_bad_input_is_named():
    a, b = net(1), net(2)
    for grid in ([0, 0.5], [0.5, 1], [0, 0.7, 0.2, 1], [0, 0.5, 0.5, 1], [1]):
        with pytest.raises(MergeidError, match="expected increasing numbers from 0 to 1"):
            curve(a, b, lambdas=grid)
    with pytest.raises(MergeidError, match="needs calibration data"):
        curve(a, b, repair=True)
    with pytest.raises(MergeidError, match="mixed precision 'int8' is unknown; expected one of no, bf16, fp16"):
        curve(a, b, mixed_precision="int8")
    state = a.state_dict()
    wrong = {**state, "head.weight": torch.zeros(3, 7)}
    with pytest.raises(MergeidError, match=r"'head.weight' has shape \[3, 7\] in the second state; .* \[5, 7\]"):
        barrier_curve(state, wrong, Net(), DATA, **TASK)
    with pytest.raises(
        MergeidError, match=r"the second state has 'more' \(and 1 more\), which the model does not have"
    ):
        barrier_curve(state, {**state, "more": state["head.bias"], "most": state["head.bias"]}, Net(), DATA, **TASK)


def test_repair_is_nothing_to_a_model_without_batchnorm():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    state = model.state_dict()
    found = barrier_curve(state, state, model, DATA, forward=lambda m, b: m(b["x"]), loss=loss, repair=True)
    assert not found.repair and found.calibration == 0


def line(losses, accuracies=None) -> BarrierResult:
    grid = tuple(k / (len(losses) - 1) for k in range(len(losses)))
    return BarrierResult(grid, tuple(losses), accuracies and tuple(accuracies), 10)


def test_the_barrier_is_the_height_above_the_chord():
    found = line([1, 4, 3], [0.9, 0.2, 0.7])
    assert (found.barrier, found.barrier_lambda, found.barrier_accuracy) == (2, 0.5, pytest.approx(60))
    assert line([1, 0, 3], [0.5, 0.9, 0.5]).barrier == 0
    assert line([1, 0, 3], [0.5, 0.9, 0.5]).barrier_accuracy == 0
    assert line([1, math.inf, 3]).barrier == line([1, math.nan, 3]).barrier == math.inf
    assert line([0.1, 0.1, 0.1, 0.1]).excess == (0, 0, 0, 0)


def test_json_and_back():
    found = curve(net(1), net(2), label="direct", **REPAIRED)
    text = json.dumps(found.to_json(), allow_nan=False)
    assert BarrierResult.from_json(json.loads(text)) == found
    broken = line([1, math.inf, 3]).to_json()
    assert broken["barrier"] is None and broken["losses"] == [1, None, 3]
    assert BarrierResult.from_json(broken).barrier == math.inf
    with pytest.raises(ValueError, match=r"expected a barrier result of format"):
        BarrierResult.from_json({"format": "other"})


class Fourier(nn.Module):
    """Complex weights between two real layers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.enter, self.head = nn.Linear(64, 8), nn.Linear(8, CLASSES)
        self.weight = nn.Parameter(torch.randn(5, dtype=torch.cfloat))

    def forward(self, x):
        spectrum = torch.fft.rfft(F.relu(self.enter(x.flatten(1)))) * self.weight
        return self.head(torch.fft.irfft(spectrum, n=8))


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_complex_weights_keep_their_imaginary_parts(dtype):
    """A loop over the losses of averages, in float64."""
    a, b = (Fourier(seed).eval() for seed in (1, 2))
    losses = []
    for x in (0, 0.5, 1):
        net = Fourier(0).eval()
        net.load_state_dict({k: torch.lerp(v, b.state_dict()[k], x) for k, v in a.state_dict().items()})
        with torch.no_grad():
            losses.append(float(F.cross_entropy(net(DATA.x), DATA.labels)))
    found = barrier_curve(a.state_dict(), b.state_dict(), Fourier(0), DATA, lambdas=[0, 0.5, 1], dtype=dtype, **TASK)
    assert found.losses == pytest.approx(losses, rel=1e-5)
