"""Shrunken BatchNorm statistics against naive loops, and their errors against simulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluate_helpers import Items, forward, net
from torch import nn

from mergeid.data.batches import FixedBatches
from mergeid.repair.batchnorm import batchnorm_layers, calibration_batches, reestimate_batchnorm
from mergeid.repair.shrunken import example_sums, shrunken, width

F64 = torch.float64


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_hand(x: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The module's text, word for word, on [N, C, positions]."""
    count, channels = len(x), x.shape[1]
    measured = x.transpose(1, 0, 2).reshape(channels, -1)
    m, v = measured.mean(1), measured.var(1)
    parts = []
    for about in ("mean", "variance"):
        shifts, errors = [], []
        for c in range(channels):
            values = x[:, c] if about == "mean" else (x[:, c] - m[c]) ** 2
            of_examples = values.mean(1)
            error = of_examples.var(ddof=1) / count
            if about == "mean":
                shifts.append((m[c] - mean[c]) / np.sqrt(v[c]))
                errors.append(error / v[c])
            else:
                shifts.append(np.log(v[c] / variance[c]))
                errors.append(error / v[c] ** 2)
        beyond = max(0.0, float(np.mean([s * s - e for s, e in zip(shifts, errors, strict=True)])))
        parts.append(np.array([beyond / (beyond + e) * s for s, e in zip(shifts, errors, strict=True)]))
    return mean + np.sqrt(v) * parts[0], variance * np.exp(parts[1])


@pytest.mark.parametrize(("count", "shape"), [(7, ()), (40, ()), (12, (3, 5)), (2, (4,))])
@pytest.mark.parametrize("far", [0.0, 0.1, 3.0])
def test_against_a_naive_loop(count, shape, far):
    x = torch.randn(count, 6, *shape, generator=seeded(count), dtype=F64) * 3 + 5
    x = x + torch.randn(count, 6, *(1 for _ in shape), generator=seeded(1), dtype=F64)  # positions of one example
    mean = 5 + far * torch.randn(6, generator=seeded(2), dtype=F64)
    variance = 10 * torch.exp(far * torch.randn(6, generator=seeded(3), dtype=F64))
    flat = x.transpose(0, 1).flatten(1)
    found = shrunken(
        torch.tensor([flat.shape[1]], dtype=F64),
        flat.mean(1),
        flat.var(1, correction=0),
        example_sums(x, mean),
        (mean, variance),
    )
    expected = by_hand(x.reshape(count, 6, -1).numpy(), mean.numpy(), variance.numpy())
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-9)


def test_sums_add_up_over_calls():
    x, about = torch.randn(9, 4, 5, generator=seeded(0), dtype=F64), torch.randn(4, generator=seeded(1), dtype=F64)
    whole = example_sums(x, about)
    assert len(whole) == width(4)
    torch.testing.assert_close(example_sums(x[:2], about) + example_sums(x[2:], about), whole)


@pytest.mark.parametrize("count", [16, 64])
@pytest.mark.parametrize("far", [0.0, 0.05, 0.2, 1.0, 5.0])
def test_nearer_to_the_truth_than_measured_and_not_farther_than_averaged(count, far):
    """Mean squared error over many draws, of means and of logarithms of variances."""
    errors = {"shrunken": [], "measured": [], "averaged": []}
    layer = nn.BatchNorm1d(48, dtype=F64).eval()
    for seed in range(60):
        g = seeded(seed)
        mean, deviation = torch.randn(48, generator=g, dtype=F64), torch.rand(48, generator=g, dtype=F64) + 0.5
        truth = mean, 2 * deviation.log()
        off = [far * torch.randn(48, generator=g, dtype=F64) * s for s in (deviation, 1)]
        own = [t + o for t, o in zip(truth, off, strict=True)]
        x = mean + deviation * torch.randn(count, 48, generator=g, dtype=F64)
        for name in errors:
            layer.running_mean.copy_(own[0]), layer.running_var.copy_(own[1].exp())
            if name != "averaged":
                shrink = name == "shrunken"
                reestimate_batchnorm(layer, [{"x": x}], forward=lambda m, b: m(b["x"]), shrink=shrink)
            apart = (layer.running_mean - mean) / deviation, layer.running_var.log() - truth[1]
            errors[name].append([float(a.square().mean()) for a in apart])
    shrunk, measured, averaged = (np.mean(errors[name], 0) for name in errors)
    assert (shrunk < 1.02 * measured).all()
    # the error's own error costs little: logarithms of variances lie too low on average where rows are few
    assert (shrunk < averaged + 0.2 * measured).all()


@pytest.mark.parametrize("size", [1, 8, 17, 60, None])
def test_batches_do_not_matter(size):
    expected, found, data = net(1, F64), net(1, F64), Items(60)
    reestimate_batchnorm(expected, [{"x": data.x}], forward=forward, shrink=True)
    reestimate_batchnorm(
        found, calibration_batches(found, data, forward=forward, size=size), forward=forward, shrink=True
    )
    for name, layer in batchnorm_layers(expected).items():
        got = batchnorm_layers(found)[name]
        torch.testing.assert_close(got.running_mean, layer.running_mean, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(got.running_var, layer.running_var, rtol=1e-8, atol=1e-9)


def test_one_example_tells_nothing():
    model = net(3, F64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    reestimate_batchnorm(model, FixedBatches(Items(1), 1), forward=forward, shrink=True)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_constant_channels_and_statistics_of_no_use():
    """A channel without variance keeps what it had; one that had none takes what is measured; both leave the rest."""
    layer = nn.BatchNorm1d(6, dtype=F64).eval()
    x = torch.randn(200, 6, generator=seeded(0), dtype=F64)
    alone = nn.BatchNorm1d(4, dtype=F64).eval()
    x[:, 4] = 7.0
    layer.running_var[5] = 0.0
    for model, rows in ((layer, x), (alone, x[:, :4])):
        reestimate_batchnorm(model, [{"x": rows}], forward=lambda m, b: m(b["x"]), shrink=True)
    assert float(layer.running_var[4]) == 1.0
    torch.testing.assert_close(layer.running_var[5], x[:, 5].var(correction=0))
    torch.testing.assert_close(layer.running_var[:4], alone.running_var)
    assert torch.isfinite(layer.running_mean).all()
