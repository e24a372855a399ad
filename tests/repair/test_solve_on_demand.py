"""Layers whose weights are formed when they are used, and answers that are too wide to be held."""

from __future__ import annotations

import copy
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from test_repair_solve import BATCHES, Everything, Standardised, forward, pair, seeded
from torch import Tensor, nn

from mergeid.basics.on_demand import OnDemand, memory_of, put_weights
from mergeid.basics.on_disk import on_disk
from mergeid.errors import MergeidError
from mergeid.repair import closed_form, few_rows, layers
from mergeid.repair.solve import solve_network


def on_demand(net: nn.Module) -> nn.Module:
    """A copy whose matrices and kernels are read from the original's."""
    found = copy.deepcopy(net)

    def reader(value: Tensor) -> Any:
        return lambda which: value[which]

    values = {id(p): OnDemand(reader(p.detach().clone()), p.shape, p.dtype) for p in found.parameters() if p.dim() > 1}
    put_weights(found, values)
    return found


@pytest.mark.parametrize("kind", [Everything, Standardised])
def test_solving_on_demand_is_solving_in_memory(kind: type[nn.Module]) -> None:
    a, b = pair(kind=kind)
    merged, pieces = copy.deepcopy(a), on_demand(a)
    done = solve_network(merged, [a, b], [0.3, 0.7], forward, BATCHES)
    also = solve_network(pieces, [on_demand(a), on_demand(b)], [0.3, 0.7], forward, BATCHES)
    assert [layer.weights for layer in done] == [layer.weights for layer in also]
    assert sum(layer.ridge < inf for layer in done) > 3
    for name, value in merged.state_dict().items():
        other = pieces.state_dict()[name]
        assert isinstance(other, OnDemand) == (value.dim() > 1 and isinstance(pieces.get_parameter(name), nn.Parameter))
        found = other.whole() if isinstance(other, OnDemand) else other
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)


class Head(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 12), nn.Linear(12, 40, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x).relu())
        return out


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("demanded", [True, False])
def test_a_wide_answer_in_blocks(bias: bool, demanded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one ridge to choose from, blocks of outputs have the solution of all outputs together."""
    for module in (closed_form, few_rows):
        monkeypatch.setattr(module, "RIDGES", (0.01,))
    monkeypatch.setattr(closed_form.fit, "__kwdefaults__", {"ridges": (0.01,)})
    torch.manual_seed(0)
    a = Head(bias)
    b = copy.deepcopy(a)
    with torch.no_grad():
        for p in b.parameters():
            p.add_(0.3 * torch.randn_like(p))
    batches = [{"x": seeded(120, 8)}, {"x": seeded(80, 8, seed=1)}]
    whole, blocks = copy.deepcopy(a), on_demand(a) if demanded else copy.deepcopy(a)
    solve_network(whole, [a, b], [0.5, 0.5], forward, batches)
    monkeypatch.setattr(layers, "WIDE", 3000)  # the head answers 120 x 40, the body 120 x 12
    monkeypatch.setattr(layers, "BLOCK", 120 * 13)
    done = solve_network(blocks, [a, b], [0.5, 0.5], forward, batches)
    assert [layer.weights[0] for layer in done].count("head.bias" if bias else "head.weight") == 4
    with torch.no_grad():
        torch.testing.assert_close(blocks(seeded(9, 8, seed=2)), whole(seeded(9, 8, seed=2)), rtol=1e-4, atol=1e-4)
        assert float((whole.head.weight - a.head.weight).norm() / a.head.weight.norm()) > 0.05


def test_values_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for value in (seeded(5, 7), seeded(5, 7).T, seeded(3, 4, 2).bfloat16(), seeded(6, 2).double()):
        found = on_disk(value)
        assert torch.equal(found, value) and found.dtype == value.dtype
        assert memory_of(found) != memory_of(value)
    assert not list(tmp_path.iterdir())
    if Path("/dev/full").exists():
        monkeypatch.setattr(Path, "open", lambda path, mode: open("/dev/full", mode))  # noqa: SIM115
        with pytest.raises(MergeidError, match="set TMPDIR to a folder on a larger disk"):
            on_disk(seeded(2, 2))
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bias", [True, False])
def test_a_ridge_at_a_time_has_the_solution_of_all_at_once(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, mean = seeded(60, 90), seeded(20, 90, seed=1)
    y = x @ (mean + 0.3 * seeded(20, 90, seed=2)).T + 0.1 * seeded(60, 20, seed=3)

    def fitted() -> closed_form.Fit:
        seen, unseen = few_rows.Gathered(90, 20), few_rows.Gathered(90, 20)
        seen.add(x[:45], y[:45])
        unseen.add(x[45:], y[45:])
        return few_rows.fit_gathered(seen, unseen, mean, seeded(20, seed=4) if bias else None)

    one = fitted()
    monkeypatch.setattr(few_rows, "MANY", 0)
    monkeypatch.setattr(few_rows, "COLUMNS", 7)
    two = fitted()
    assert one.ridge == two.ridge < inf and one.after < one.before
    assert two.after == pytest.approx(one.after, rel=1e-9)
    torch.testing.assert_close(two.weight, one.weight, rtol=1e-9, atol=1e-9)
