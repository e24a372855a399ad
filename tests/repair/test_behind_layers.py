"""What lies behind a layer up to the next one, and what of it is known; the data that statistics are probed on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from mergeid.models.examples import Examples
from mergeid.models.running import make_accelerator
from mergeid.repair.batchnorm import reestimated
from mergeid.repair.beyond import Beyond, beyond
from mergeid.repair.paced import record
from mergeid.repair.rescale import _median_ratio


class Behind(nn.Module):
    """A layer, something after it, and a nonlinearity."""

    def __init__(self, then: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        self.gain, self.shift = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.randn(6))
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        said: Tensor = self.b(self.then(self, self.a(x), x).tanh())
        return said


def first(net: nn.Module, x: Tensor) -> Beyond | None:
    return beyond(record(net, lambda model, batch: model(batch["x"]), {"x": x}).nodes).get(0)


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("then", "gain", "shift"),
    [
        (lambda net, h, x: h * net.gain, lambda net: net.gain, lambda net: 0 * net.gain),
        (lambda net, h, x: net.gain * h + net.shift, lambda net: net.gain, lambda net: net.shift),
        (lambda net, h, x: h / net.gain, lambda net: 1 / net.gain, lambda net: 0 * net.gain),
        (lambda net, h, x: (h + net.shift) * 3, lambda net: 3 + 0 * net.gain, lambda net: 3 * net.shift),
    ],
)
def test_gains_and_shifts_behind_a_layer_are_known(
    then: Callable[..., Tensor], gain: Callable[..., Tensor], shift: Callable[..., Tensor]
) -> None:
    net = Behind(then)
    found = first(net, X)
    assert found is not None and not found.needs
    state = dict(net.state_dict())
    with torch.no_grad():
        answer = net.a(X)
        torch.testing.assert_close(found(state, {}, answer), then(net, answer, X))
        torch.testing.assert_close(found(state, {}, answer), answer * gain(net) + shift(net))
        torch.testing.assert_close(found.gain(state, {}, answer), gain(net).double().expand(5, 6))


@pytest.mark.parametrize(
    "then",
    [
        lambda net, h, x: h * torch.linspace(1, 2, 6),  # a tensor that is no weight, and may change from call to call
        lambda net, h, x: h + torch.linspace(1, 2, 6),
        lambda net, h, x: net.gain / h,
        lambda net, h, x: h * h,
        lambda net, h, x: h * x.mean(),  # depends on the input
        lambda net, h, x: h,
    ],
)
def test_what_is_no_known_gain_or_shift_ends_the_map(then: Callable[..., Tensor]) -> None:
    assert first(Behind(then), X) is None


@dataclass
class Item:
    """No kind that torch puts into batches by itself."""

    row: Tensor


def test_items_of_any_kind_are_probed_through_their_own_collate() -> None:
    rows = [torch.randn(3, generator=torch.Generator().manual_seed(k)) for k in range(12)]
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    examples = Examples([Item(r) for r in rows], lambda items: {"x": torch.stack([i.row for i in items])})
    found = reestimated(net, examples, lambda model, batch: model(batch["x"]), make_accelerator("cpu"))
    torch.testing.assert_close(found["0.running_mean"], torch.stack(rows).mean(0))


def test_a_ratio_of_nothing_is_one() -> None:
    nothing = torch.zeros(3, dtype=torch.float64)
    found = {"a": type("Moments", (), {"std": nothing + 2})()}
    assert _median_ratio({}, {}) == 1
    assert _median_ratio(found, {"a": (nothing, nothing)}) == 1
    assert _median_ratio(found, {"a": (nothing, torch.tensor([1.0, 0.0, 4.0], dtype=torch.float64))}) == 0.5
