"""`evaluate`: exact sums over a data set, whatever the batch size."""

from __future__ import annotations

import math

import pytest
import torch
from evaluate_helpers import Items, forward, loss, net
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from mergeid.data.batches import FixedBatches, balanced, consecutive, loaded, shared_out
from mergeid.errors import MergeidError
from mergeid.evaluate.measure import Metrics, evaluate
from mergeid.models.running import make_accelerator
from mergeid.plugins import LossParts

TASK = {"forward": forward, "loss": loss}


def naive(model: nn.Module, data: Items) -> Metrics:
    """One example at a time, in plain Python sums."""
    total, right = 0.0, 0
    for item in data:
        output = model(item["x"][None].to(next(model.parameters()).dtype))[0]
        total += -F.log_softmax(output, -1)[item["labels"]].item()
        right += int(output.argmax() == item["labels"])
    return Metrics(total / len(data), right / len(data), len(data))


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_agrees_with_a_loop_over_single_examples(batch_size):
    model, data = net(0, torch.float64), Items(103)
    expected, found = naive(model, data), evaluate(model, data, batch_size=batch_size, **TASK)
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    assert (found.accuracy, found.count) == (expected.accuracy, expected.count)


def test_counts_predictions_and_not_examples():
    """Sequences of different length: Σ loss / Σ count, not a mean of means."""
    lengths = torch.tensor([1, 5, 2, 9, 3])

    def token_loss(output, batch):
        n = batch["labels"]
        return LossParts(output[:, 0] * n, n // 2, n)

    data = [{"x": torch.tensor([float(k)]), "labels": n} for k, n in enumerate(lengths)]
    found = evaluate(nn.Identity(), data, forward=lambda model, batch: batch["x"], loss=token_loss, batch_size=2)
    assert found == Metrics((0 * 1 + 1 * 5 + 2 * 2 + 3 * 9 + 4 * 3) / 20, (0 + 2 + 1 + 4 + 1) / 20, 20)


def test_a_task_without_accuracy_reports_none():
    def regression(output, batch):
        zero = torch.zeros(len(output), dtype=torch.long)
        return LossParts(output.square().sum(1), zero, zero + 1)

    assert evaluate(net(0), Items(9), forward=forward, loss=regression).accuracy is None


def test_leaves_training_flags_alone_and_runs_in_eval_mode():
    model = net(0).train()
    model.bn2.eval()
    flags = [module.training for module in model.modules()]
    first = evaluate(model, Items(20), **TASK)
    assert [module.training for module in model.modules()] == flags
    assert first == evaluate(model, Items(20), **TASK)  # dropout would differ


def test_inputs_take_the_models_dtype_and_16_bit_outputs_are_scored_in_float32():
    seen = []

    def watched(output, batch):
        seen.append((batch["x"].dtype, output.dtype, batch["labels"].dtype))
        return loss(output, batch)

    found = evaluate(net(0, torch.bfloat16), Items(20), forward=forward, loss=watched)
    assert seen == [(torch.bfloat16, torch.float32, torch.int64)]
    assert found.loss == pytest.approx(evaluate(net(0), Items(20), **TASK).loss, rel=0.1)


def test_a_network_that_overflows_gives_inf_and_not_an_error():
    model = net(0)
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([math.inf, 0, 0, 0, 0]))
    assert not math.isfinite(evaluate(model, Items(20), **TASK).loss)


@given(st.integers(1, 300), st.integers(1, 80), st.integers(1, 5))
def test_processes_share_all_examples_without_overlap(count, size, world):
    for slices in (consecutive(count, size), balanced(count, size)):
        assert [i for part in slices for i in part] == list(range(count))
        assert all(0 < len(part) <= size for part in slices)
        rows = list(range(count))
        parts = [
            list(loaded(rows, slices, rank=rank, world=world, collate=lambda items: {"x": items}))
            for rank in range(world)
        ]
        seen = sorted((index, tuple(batch["x"])) for part in parts for index, batch in part)
        assert seen == [(index, tuple(part)) for index, part in enumerate(slices)]
    lengths = [len(part) for part in balanced(count, size)]
    assert max(lengths) - min(lengths) <= 1


def test_a_process_reads_only_its_own_batches_of_a_sequence():
    asked = []

    class Watched(Items):
        def __getitem__(self, index):
            asked.append(index)
            return super().__getitem__(index)

    batches = FixedBatches(Watched(10), 2)
    assert [index for index, _ in shared_out(batches, rank=1, world=2)] == [1, 3]
    assert asked == [2, 3, 6, 7]
    assert [index for index, _ in shared_out(iter(list(batches)), rank=1, world=2)] == [1, 3]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "has no examples"),
        (iter([1]), "has no length"),
        ([torch.zeros(3)], "expected a mapping from the model's keywords"),
        ([{"x": torch.zeros(3, 8, 8), "labels": 0}] * 2, r"does not fit the model.*x float32 \[2, 3, 8, 8\]"),
        ([{"x": torch.zeros(1, 8, 8), "labels": 11}], "does not fit the model.*labels int64.*out of bounds"),
        ([{"x": torch.zeros(k, 8, 8)} for k in (1, 2)], "examples 0 to 1 of the data cannot be read as one batch"),
        ([{"x": torch.zeros(1, 8, 8)}], "does not fit the model.*labels"),
    ],
)
def test_data_that_does_not_fit_is_named(data, message):
    with pytest.raises(MergeidError, match=message):
        evaluate(net(0), data, **TASK)


def test_losses_that_are_no_losses_are_named():
    def mean_loss(output, batch):
        return LossParts(*(part.float().mean() for part in loss(output, batch)))

    with pytest.raises(MergeidError, match="one loss and one count per example"):
        evaluate(net(0), Items(4), forward=forward, loss=mean_loss)
    with pytest.raises(MergeidError, match="no task loss"):
        evaluate(net(0), Items(4), forward=forward, loss=lambda output, batch: None)
    with pytest.raises(MergeidError, match="nothing can be scored"):
        evaluate(net(0), Items(4), forward=forward, loss=lambda o, b: LossParts(*(p * 0 for p in loss(o, b))))
    with pytest.raises(MergeidError, match="batch size is 0"):
        evaluate(net(0), Items(4), batch_size=0, **TASK)


def test_devices_that_are_not_there_are_named():
    with pytest.raises(MergeidError, match="device 'nonsense' cannot be used here"):
        make_accelerator("nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(MergeidError, match="device 'cuda' cannot be used here"):
            make_accelerator("cuda")
        assert make_accelerator("cpu").device.type == "cpu"
