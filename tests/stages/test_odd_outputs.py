"""Networks that return as many boxes as they see, and networks that take batches of one size only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergeid
from mergeid import MergeidError

ROWS = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
DATA: list[dict[str, Any]] = [{"arg0": row, "labels": torch.tensor(i % 3)} for i, row in enumerate(ROWS)]


class Boxes(nn.Module):
    """Of every batch those rows that score, and, where asked for, logits of all."""

    def __init__(self, seed: int, logits: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.logits = nn.Linear(6, 8), nn.Linear(8, 3), logits

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.b(self.a(x).relu())
        found = {"boxes": y[y[:, 0] > y[:, 0].median() + self.b.bias.sum()]}
        return {"logits": y, **found} if self.logits else found


def test_outputs_that_vary_in_number_are_left_out_of_the_comparison() -> None:
    a, b = (Boxes(seed, logits=True).eval() for seed in (0, 1))
    assert a(ROWS)["boxes"].shape != b(ROWS)["boxes"].shape
    merged = mergeid.merge(a, b, data=DATA, example_inputs=ROWS[:4], force=True)
    again = mergeid.merge(a, b, data=DATA, example_inputs=ROWS[:4], force=True, outputs=["logits"])
    assert merged.state.keys() == a.state_dict().keys()
    assert all(torch.equal(merged.state[k], v) for k, v in again.state.items())


def test_where_nothing_else_is_returned_it_is_said() -> None:
    a, b = (Boxes(seed, logits=False).eval() for seed in (0, 1))
    with pytest.raises(MergeidError, match=r"outputs of different shapes for the same inputs .*; name outputs"):
        mergeid.merge(a, b, data=DATA, example_inputs=ROWS[:4], force=True, batch_size=40)


class Four(nn.Module):
    """Takes batches of four."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x).view(4, 8).relu())
        return out


VERBS: dict[str, Callable[..., Any]] = {
    "plan": mergeid.plan,
    "merge": lambda *models, **options: mergeid.merge(*models, force=True, **options),
    "predict": mergeid.predict,
    "similarity": mergeid.similarity,
    "barrier": mergeid.barrier,
    "zip": mergeid.zip_models,
    "rank": lambda *models, **options: mergeid.rank(list(models), **options),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_batch_that_does_not_fit_is_said_in_a_sentence(verb: str) -> None:
    with pytest.raises(MergeidError, match=r"the data does not fit the model: with a batch of arg0 float32 \[\d+, 6\]"):
        VERBS[verb](Four(0).eval(), Four(1).eval(), data=DATA, example_inputs=ROWS[:4])
