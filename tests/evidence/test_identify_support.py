"""Supports of layer inputs against NumPy on the whole data, unfolding against the layers' own outputs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from mergeid.errors import MergeidError
from mergeid.evidence.inputs import (
    InputReader,
    Looks,
    input_moments,
    layer_inputs,
    layers,
    merge_moments,
    supports,
    weight_rows,
)
from mergeid.evidence.support import InputMoments, TokenCounts


def forward(model, batch):
    return model(batch["x"])


def low_rank(rows, d, scales, seed):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((d, len(scales))))[0]
    x = (rng.standard_normal((rows, len(scales))) * scales) @ basis.T
    return x + 0.01 * rng.standard_normal((rows, d)) + rng.standard_normal(d)


def numpy_support(x, tau, centred):
    x = x.astype(np.float64)
    shifted = x - x.mean(0) if centred else x
    _, s, vt = np.linalg.svd(shifted, full_matrices=False)
    values = s**2 / len(x)
    k = int(np.flatnonzero(np.cumsum(values) / values.sum() >= tau)[0]) + 1
    return vt[:k].T, k, values


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("tau", [0.5, 0.9, 0.999])
def test_support_is_that_of_the_svd_of_all_rows(centred, tau):
    x = low_rank(3000, 20, [5, 4, 3, 2, 1, 0.5], 0)
    moments = InputMoments(20)
    for part in np.array_split(x, 7):
        moments.add(torch.from_numpy(part))
    support = moments.support(tau, centred=centred)
    u, k, values = numpy_support(x, tau, centred)
    assert support.k == k and support.rows == 3000
    np.testing.assert_allclose((support.U @ support.U.T).numpy(), u @ u.T, atol=1e-9)
    np.testing.assert_allclose(support.variances.numpy(), values, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(support.mean.numpy(), x.mean(0), rtol=1e-12)
    assert support.explained == pytest.approx(values[:k].sum() / values.sum(), rel=1e-10)
    assert support.explained >= tau and (k == 1 or values[: k - 1].sum() / values.sum() < tau)
    assert support.eigengap == pytest.approx(values[k - 1] - values[k], rel=1e-8)
    assert support.coherence == pytest.approx((u**2).sum(1).max(), rel=1e-8)
    assert k / 20 <= support.coherence <= 1


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 2500), max_size=6), sketch=st.sampled_from([None, 8]))
def test_batch_size_changes_no_bit(cuts, sketch):
    x = torch.from_numpy(low_rank(2500, 12, [3, 2, 1], 1)).float()
    one, many = InputMoments(12, sketch=sketch), InputMoments(12, sketch=sketch)
    one.add(x)
    edges = [0, *sorted(cuts), 2500]
    for a, b in itertools.pairwise(edges):
        many.add(x[a:b])
    left, right = one.support(), many.support()
    assert torch.equal(left.basis, right.basis) and torch.equal(left.variances, right.variances)
    assert left.k == right.k and left.error == right.error


@pytest.mark.parametrize("sketch", [None, 10])
def test_devices_merge_to_the_sums_of_the_whole(sketch):
    x = torch.from_numpy(low_rank(2000, 15, [4, 3, 2], 2))
    whole, one, two = (InputMoments(15, sketch=sketch) for _ in range(3))
    whole.add(x)
    one.add(x[::2])
    two.add(x[1::2])
    a, b = whole.support(), one.merge(two).support()
    torch.testing.assert_close(a.variances, b.variances, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(a.U @ a.U.T, b.U @ b.U.T, rtol=0, atol=1e-10)


def test_other_sketches_do_not_merge():
    one = InputMoments(9, sketch=4, generator=torch.Generator().manual_seed(1))
    two = InputMoments(9, sketch=4, generator=torch.Generator().manual_seed(2))
    with pytest.raises(MergeidError, match="cannot be merged"):
        one.merge(two)
    with pytest.raises(MergeidError, match="cannot be merged"):
        one.merge(InputMoments(9))


def test_sketch_stays_within_its_stated_error():
    """‖A − Â‖₂ ≤ tr A − tr Â always; the mean trace of the error ≤ (1 + k/(l − k − 1)) of the best rank-k one."""
    d, l, k = 60, 24, 10
    rng = np.random.default_rng(3)
    x = rng.standard_normal((400, d)) * (1 / np.arange(1, d + 1)) @ np.linalg.qr(rng.standard_normal((d, d)))[0]
    covariance = np.cov(x.T, bias=True)
    values = np.linalg.eigvalsh(covariance)[::-1]
    traces = []
    for seed in range(30):
        moments = InputMoments(d, sketch=l, generator=torch.Generator().manual_seed(seed))
        moments.add(torch.from_numpy(x))
        support = moments.support(0.9)
        made = (support.basis * support.variances) @ support.basis.T
        gap = np.linalg.eigvalsh(covariance - made.numpy())
        assert gap[-1] <= support.error * (1 + 1e-9) and gap[0] >= -1e-12 * values[0]
        assert support.total == pytest.approx(values.sum(), rel=1e-10)
        traces.append(gap.sum())
        exact = numpy_support(x, 0.9, True)
        assert support.k >= exact[1]  # what is missed counts as unexplained
    assert np.mean(traces) <= (1 + k / (l - k - 1)) * values[k:].sum()


def test_sketch_of_low_rank_inputs_is_exact_and_says_when_it_falls_short():
    x = torch.from_numpy(np.random.default_rng(4).standard_normal((300, 5)) @ np.ones((5, 5)).cumsum(0) @ np.eye(5, 40))
    moments = InputMoments(40, sketch=8)
    moments.add(x)
    support = moments.support(0.999)
    u, k, _ = numpy_support(x.numpy(), 0.999, True)
    assert support.k == k and support.error < 1e-9 * support.total
    torch.testing.assert_close(support.U @ support.U.T, torch.from_numpy(u @ u.T), rtol=0, atol=1e-8)
    wide = InputMoments(40, sketch=3)
    wide.add(torch.from_numpy(np.random.default_rng(5).standard_normal((500, 40))))
    assert wide.support(0.9).k == 3 and wide.support(0.9).explained < 0.2


CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    nn.Conv2d(4, 6, 3, padding="same", dilation=2, bias=False),
    nn.Conv2d(4, 6, (2, 4), padding="same"),
    nn.Conv2d(4, 6, 3, padding="valid", stride=3),
    nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect", groups=2),
    nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular", groups=4),
    nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate", groups=4, stride=2),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_unfolded_rows_times_weights_are_the_convolution(layer):
    x = torch.randn(3, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    check_rows(layer, x)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(6, 4, 5, padding=2, stride=2, groups=2), (2, 6, 11)),
        (nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 1, 1)), (2, 2, 4, 5, 6)),
        (nn.Linear(5, 7), (3, 4, 5)),
        (nn.Linear(5, 7, bias=False), (3, 2, 4, 5)),
        (Conv1D(7, 5), (3, 4, 5)),
    ],
    ids=str,
)
def test_rows_of_other_layers(layer, shape):
    check_rows(layer, torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def test_padding_that_a_layer_adds_by_itself():
    from timm.layers import Conv2dSame

    for kernel, stride, size in [(3, 2, 9), (3, 2, 8), (5, 3, 11), (2, 1, 6)]:
        check_rows(Conv2dSame(4, 6, kernel, stride), torch.randn(2, 4, size, size + 1))


def check_rows(layer, x):
    model = nn.Sequential(layer)
    rows = layer_inputs(model, {"x": x}, forward, ["0"])["0"].double()
    weight = weight_rows(layer, layer.weight.detach()).double()
    groups = rows.shape[1]
    out = torch.cat([rows[:, g] @ w.T for g, w in enumerate(weight.chunk(groups))], 1)
    if layer.bias is not None:
        out = out + layer.bias.detach()
    expected = layer(x).detach()
    convolution = isinstance(layer, nn.modules.conv._ConvNd)
    expected = expected.movedim(1, -1) if convolution else expected
    torch.testing.assert_close(out.float(), expected.reshape(-1, expected.shape[-1]), rtol=1e-4, atol=1e-5)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1, groups=2, bias=False)
        self.out = nn.Linear(8, 5)

    def forward(self, tokens):
        h = torch.tanh(self.embed(tokens)).transpose(1, 2)
        return self.out(torch.relu(self.conv(h)).transpose(1, 2))


def token_batches(size, examples=24, length=7):
    tokens = torch.randint(0, 11, (examples, length), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(length) < torch.randint(
        2, length + 1, (examples, 1), generator=torch.Generator().manual_seed(4)
    )
    return [{"x": tokens[i : i + size], "attention_mask": mask[i : i + size].long()} for i in range(0, examples, size)]


@pytest.mark.parametrize("positions", [None, 3])
def test_model_supports_do_not_depend_on_the_batch_size(positions):
    torch.manual_seed(0)
    model = Net().double()
    found = [supports(model, token_batches(n), forward, reading=Looks(positions)) for n in (1, 5, 24)]
    assert list(found[0]) == ["embed", "conv", "out"] and len(found[0]["conv"]) == 2
    for other in found[1:]:
        for name in found[0]:
            for a, b in zip(found[0][name], other[name], strict=True):
                assert a.k == b.k and a.rows == b.rows
                torch.testing.assert_close(a.U @ a.U.T, b.U @ b.U.T, rtol=0, atol=1e-9)


def test_masked_tokens_are_not_read_and_groups_have_their_own_support():
    torch.manual_seed(0)
    model = Net().double()
    batch = token_batches(24)[0]
    keep = batch["attention_mask"].bool()
    found = supports(model, [batch], forward)
    with torch.no_grad():
        h = torch.tanh(model.embed(batch["x"]))
        hidden = torch.relu(model.conv(h.transpose(1, 2))).transpose(1, 2)[keep].numpy()
    u, k, _ = numpy_support(hidden, 0.9, True)
    assert found["out"][0].k == k and found["out"][0].centred and found["out"][0].rows == int(keep.sum())
    np.testing.assert_allclose((found["out"][0].U @ found["out"][0].U.T).numpy(), u @ u.T, atol=1e-9)
    padded = np.pad(h.numpy(), ((0, 0), (1, 1), (0, 0)))
    patches = np.stack([padded[:, p : p + 3].transpose(0, 2, 1) for p in range(7)], 1)  # [B, L, C, 3]
    for g, support in enumerate(found["conv"]):
        rows = patches[keep.numpy()][:, 3 * g : 3 * g + 3].reshape(-1, 9)
        u, k, _ = numpy_support(rows, 0.9, False)
        assert support.k == k and not support.centred
        np.testing.assert_allclose((support.U @ support.U.T).numpy(), u @ u.T, atol=1e-9)


def test_embedding_equals_the_one_hot_rows():
    tokens = torch.randint(0, 20, (300,), generator=torch.Generator().manual_seed(5)) ** 2 // 20
    counts = TokenCounts(25)
    counts.add(tokens[:100].reshape(4, 25))
    other = TokenCounts(25)
    other.add(tokens[100:])
    support = counts.merge(other).support(0.7)
    one_hot = np.eye(25)[tokens.numpy()]
    values = np.linalg.eigvalsh(one_hot.T @ one_hot / 300)[::-1]
    k = int(np.flatnonzero(np.cumsum(values) >= 0.7)[0]) + 1
    assert support.k == k and support.coherence == 1 and support.rows == 300
    np.testing.assert_allclose(support.variances.numpy(), values[: len(support.variances)], atol=1e-12)
    seen = set(np.argsort(-one_hot.sum(0), kind="stable")[:k].tolist())
    assert set(support.U.argmax(0).tolist()) == seen
    rows = torch.randn(3, 25, dtype=torch.float64)
    torch.testing.assert_close(support.project(rows), rows @ support.U)
    with pytest.raises(MergeidError, match="embedding is not centred"):
        counts.support(centred=True)


def test_two_devices_on_a_model():
    torch.manual_seed(0)
    model = Net().double()
    batches = token_batches(4)
    whole = input_moments(model, batches, forward)
    parts = merge_moments(input_moments(model, batches[::2], forward), input_moments(model, batches[1::2], forward))
    for name in whole:
        for a, b in zip(whole[name], parts[name], strict=True):
            centred = name == "out"
            torch.testing.assert_close(
                a.support(centred=centred).variances, b.support(centred=centred).variances, rtol=1e-9, atol=1e-12
            )
    with pytest.raises(MergeidError, match="of different layers"):
        merge_moments(whole, {})


def test_wide_layers_are_sketched():
    model = nn.Sequential(nn.Linear(40, 3))
    x = torch.from_numpy(low_rank(200, 40, [3, 2, 1], 6)).float()
    found = supports(model, [{"x": x}], forward, reading=Looks(exact=16, columns=12))["0"][0]
    exact = supports(model, [{"x": x}], forward)["0"][0]
    assert found.basis.shape == (40, 12) and 0 < found.error < 0.01 * found.total and exact.error == 0
    assert torch.linalg.matrix_norm(found.U @ found.U.T - exact.U @ exact.U.T, 2) < 0.01


def test_constant_inputs_have_no_support():
    moments = InputMoments(4)
    moments.add(torch.ones(10, 4))
    support = moments.support()
    assert support.k == 0 and support.U.shape == (4, 0) and support.coherence == 0 and support.eigengap == 0


def test_layers_lists_what_can_be_read():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.ConvTranspose2d(2, 2, 2), nn.Embedding(3, 2), Conv1D(3, 2))
    assert list(layers(model)) == ["0", "3", "4"]


def test_single_examples_without_a_batch_dimension():
    conv, line = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(4, 3)
    x = torch.randn(2, 5, 6)
    together = layer_inputs(nn.Sequential(conv), {"x": x[None]}, forward, ["0"])["0"]
    assert torch.equal(layer_inputs(nn.Sequential(conv), {"x": x}, forward, ["0"])["0"], together)
    assert layer_inputs(nn.Sequential(line), {"x": x[0, 0, :4]}, forward, ["0"])["0"].shape == (1, 1, 4)


def test_errors_say_what_to_do():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(MergeidError, match="no module 'x'"):
        supports(model, [], forward, ["x"])
    with pytest.raises(MergeidError, match="module '1' is a ReLU"):
        InputReader(model, ["1"], lambda *_: None)
    with pytest.raises(MergeidError, match="give calibration data"):
        InputMoments(2).support()
    with pytest.raises(MergeidError, match="must lie in"):
        supports(model, [{"x": torch.randn(4, 2)}], forward, ["0"], tau=1.5)
    with pytest.raises(MergeidError, match="not finite"):
        supports(model, [{"x": torch.full((4, 2), float("nan"))}], forward, ["0"])
    with pytest.raises(MergeidError, match="expected \\(rows, 2\\)"):
        InputMoments(2).add(torch.zeros(3, 3))
    with pytest.raises(MergeidError, match="not called as a module"):
        layer_inputs(nn.ModuleList([nn.Linear(2, 2)]), None, lambda m, b: None, ["0"])
    with pytest.raises(MergeidError, match="does not fit a layer"):
        weight_rows(model[0], torch.zeros(3, 2))
