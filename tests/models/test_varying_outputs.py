"""Whole inputs whose outputs differ in all their lengths: scores of every pair of nodes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mergeid
from mergeid.basics.spread import Spread
from mergeid.errors import MergeidError


class Pairs(nn.Module):
    """A score for every pair of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.q, self.k = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.q(h) @ self.k(h).mT


def made(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Pairs().eval()


GENERATOR = torch.Generator().manual_seed(0)
DATA = [{"x": torch.randn(n, 6, generator=GENERATOR), "labels": torch.arange(n)} for n in (4, 5, 6, 7) * 4]
EXAMPLE = {"x": DATA[0]["x"]}


@pytest.mark.parametrize("repair", [True, "solve"])
def test_they_are_merged(repair: bool | str) -> None:
    result = mergeid.merge(made(0), made(0), example_inputs=EXAMPLE, data=DATA, repair=repair)
    assert all(torch.allclose(result.state[k], v, atol=1e-4) for k, v in made(0).state_dict().items())
    assert mergeid.merge(made(0), made(1), example_inputs=EXAMPLE, data=DATA, repair=repair, force=True).state


def test_every_whole_input_is_measured() -> None:
    """Each row is scored against the others of its own graph."""
    a, found = made(0), mergeid.barrier(made(0), made(1), example_inputs=EXAMPLE, data=DATA)
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(a(d["x"]), d["labels"], reduction="none") for d in DATA]
    assert found.losses[0] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_they_are_no_logits() -> None:
    with pytest.raises(MergeidError, match=r"outputs have 4 classes for some inputs and [56] for others"):
        mergeid.predict(made(0), made(1), example_inputs=EXAMPLE, data=DATA)


def test_their_spread_is_that_of_all_numbers() -> None:
    spread, outs = Spread(), [torch.randn(n, n, generator=GENERATOR) for n in (4, 5, 6)]
    for out in outs:
        spread.add(out, {})
    numbers = torch.cat([o.flatten() for o in outs]).double()
    assert spread.variance(torch.float32) == pytest.approx(float(numbers.var(correction=0)))
