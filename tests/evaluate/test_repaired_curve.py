"""`barrier --repair` measures what `merge --repair bn` writes, also where the calibration data is little."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mergeid


class Normed(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU()
        )
        self.head = nn.Linear(12, 3)
        self.train()
        with torch.no_grad():
            for _ in range(60):
                self(torch.randn(64, 6))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def rows(count: int, seed: int, shift: float = 0.0) -> list[tuple[Tensor, int]]:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) + shift
    return [(row, int(row[0] > 0)) for row in x]


def losses(*nets: nn.Module) -> list[float]:
    x, y = (torch.stack([torch.as_tensor(part[k]) for part in TEST]) for k in (0, 1))
    with torch.no_grad():
        return [F.cross_entropy(net(x), y).item() for net in nets]


TEST = rows(300, 1)


@pytest.mark.parametrize("count", [16, 200])
@pytest.mark.parametrize("shift", [0.0, 0.7])
@pytest.mark.parametrize("match", ["never", "always"])
def test_points_are_what_merge_writes(count: int, shift: float, match: str) -> None:
    a, b, known = Normed(0), Normed(1), rows(count, 2, shift)
    how = {"example_inputs": torch.randn(2, 6), "match": match}
    curve = mergeid.barrier(a, b, data=TEST, calibration=known, repair=True, points=5, **how)
    for k in (1, 2, 3):
        made = copy.deepcopy(a)
        merged = mergeid.merge(a, b, data=known, repair="bn", weights=[1 - k / 4, k / 4], force=True, **how)
        made.load_state_dict(merged.state)
        assert curve.losses[k] == pytest.approx(losses(made)[0], rel=1e-5)
    assert [curve.losses[0], curve.losses[-1]] == pytest.approx(losses(a, b), rel=1e-5)
    plain = mergeid.barrier(a, b, data=TEST, points=5, calibration=known, **how)
    assert plain.losses[2] != pytest.approx(curve.losses[2], rel=1e-4)


def test_a_repaired_pair_with_itself_has_barrier_zero() -> None:
    a = Normed(0)
    found = mergeid.barrier(
        a, copy.deepcopy(a), data=TEST, calibration=rows(16, 2), repair=True, match="never",
        example_inputs=torch.randn(2, 6),
    )  # fmt: skip
    assert found.barrier == pytest.approx(0, abs=1e-6)
