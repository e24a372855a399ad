"""Hidden layers that lean to one model, where each has examples of its own."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from mergeid.errors import MergeidError
from mergeid.evaluate.nearness import Far
from mergeid.methods.registry import get_method
from mergeid.methods.settings import MergeSettings
from mergeid.models.examples import Examples
from mergeid.request.request import Run
from mergeid.results.comparison import Comparison
from mergeid.stages.compare import _leant
from mergeid.stages.imitated import leant_shares, own_shares
from mergeid.stages.members import Members


def members(weights: tuple[float, ...], owners: tuple[int, ...] | None) -> Members:
    model = SimpleNamespace(loaded=SimpleNamespace(joined=None, state=dict, names={}), plan=None)
    examples = Examples([{"x": torch.zeros(1)}] * 6, owners=owners)
    return Members([cast(Any, model)] * len(weights), None, MergeSettings(get_method("linear"), weights), examples)


def far(value: float) -> dict[str, Far]:
    return {"out": Far("nats", torch.full((1, 8), value, dtype=torch.float64))}


def looks(values: dict[int, float | None]) -> Any:
    def tried(merge: Members, kinds: Any) -> Iterator[tuple[str, list[dict[str, Far]]]]:
        value = values[cast(int, merge.leans)]
        if value is None:
            raise MergeidError("cannot be solved")
        yield kinds[0], [far(value)]

    return tried


SOLVED = Comparison({"plain+solve": 0.5}, "plain", "plain", "solve", {}, 8)


@pytest.mark.parametrize(
    ("solved", "leaning", "to"),
    [
        (0.5, {0: 0.4, 1: 0.3}, 1),
        (0.5, {0: 0.3, 1: 0.4}, 0),
        (0.5, {0: None, 1: 0.4}, 1),
        (0.5, {0: None, 1: None}, None),
        (0.5, {0: 0.481, 1: 0.6}, None),  # hardly nearer
        (0.02, {0: 0.0, 1: 0.0}, None),  # near enough
    ],
)
def test_to_the_model_for_which_it_is_nearest(solved: float, leaning: dict[int, float | None], to: int | None) -> None:
    merge = members((0.5, 0.5), (0, 1) * 3)
    found, comparison = _leant(merge, SOLVED, far(solved), looks(leaning), Run())
    assert found.leans == to
    assert comparison.repair == ("solve" if to is None else "solve+lean")
    if to is not None:
        assert comparison.outputs["out"].value == comparison.distances["plain+solve+lean"] == leaning[to]


def test_only_where_each_model_has_its_own_examples() -> None:
    merge = members((0.5, 0.5), None)
    assert _leant(merge, SOLVED, far(0.5), looks({}), Run()) == (merge, SOLVED)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.2, 0.8), (0.2, 0.3, 0.5)])
def test_every_row_of_shares_is_one(weights: tuple[float, ...]) -> None:
    """The last layer imitates each example's own model alone, hidden layers most of all the one that they lean to."""
    owners = tuple(i % len(weights) for i in range(6))
    merge = members(weights, owners)
    for to in range(len(weights)):
        leant, shares = leant_shares(merge, to)
        assert isinstance(shares.last, Tensor) and isinstance(shares.hidden, Tensor)
        torch.testing.assert_close(shares.last, torch.eye(len(weights), dtype=torch.float64)[list(owners)])
        torch.testing.assert_close(shares.hidden.sum(1), torch.ones(6, dtype=torch.float64))
        assert bool((shares.hidden >= 0).all()) and sum(leant.shares()) == pytest.approx(1)
        assert leant.shares()[to] == pytest.approx(max(weights[to], 0.75))
        foreign = torch.tensor([owner != to for owner in owners])
        assert bool((shares.hidden[foreign].argmax(1) == to).all())
    assert own_shares(members(weights, None)) == pytest.approx(weights)
