"""What the models of a merge count, and that a merge made tensor by tensor is the merge."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mergeid.methods.registry import get_method
from mergeid.methods.settings import Condition, MergeSettings
from mergeid.stages.compare import _is_the_first, _voices
from mergeid.stages.members import Member, Members, merged_tensors


def members(weights: tuple[Any, ...], method: str = "linear", base: bool = False) -> Members:
    state = {"w": torch.zeros(2, 3), "v": torch.zeros(2), "steps": torch.tensor(7)}
    models = [
        Member(cast(Any, SimpleNamespace(names={"w": "w"}, called={"w": "w"}, joined=None, state=lambda: state)))
        for _ in weights
    ]
    settings = MergeSettings(get_method(method), weights, depth={"w": 0.0})
    return Members(models, models[0] if base else None, settings)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=5))
def test_shares_are_the_weights_over_their_sum(weights: list[float]) -> None:
    found = members(tuple(weights), "task_arithmetic").shares()
    assert sum(found) == pytest.approx(1)
    assert [f * sum(weights) for f in found] == pytest.approx(weights)


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ((1.0, -1.0), [0.5, 0.5]),  # they sum to nothing
        ((1e-9, 0.0), [0.5, 0.5]),
        ((2e-8, 0.0), [1.0, 0.0]),
        ((3.0, -1.0), [1.5, -0.5]),
        ((0.3, 0.7), [0.3, 0.7]),
    ],
)
def test_shares_at_the_edge(weights: tuple[float, ...], shares: list[float]) -> None:
    assert members(weights, "task_arithmetic").shares() == pytest.approx(shares)


def test_weights_that_differ_by_tensor_count_by_its_size_in_all_and_as_they_are_there() -> None:
    told = members(((Condition(0.9, "w"), Condition(0.2)), (Condition(0.1, "w"), Condition(0.8))))
    assert told.weights() == pytest.approx([(6 * 0.9 + 2 * 0.2) / 8, (6 * 0.1 + 2 * 0.8) / 8])
    assert told.shares() == pytest.approx(told.weights())
    assert told.shares("w") == pytest.approx([0.9, 0.1]) and told.shares("v") == pytest.approx([0.2, 0.8])


@pytest.mark.parametrize(
    ("weights", "method", "base", "voices"),
    [
        ((0.3, 0.7), "linear", False, [0.3, 0.7]),
        ((0.0, 0.7), "task_arithmetic", True, [1.0]),  # who adds nothing is not asked
        ((0.4, 0.7), "task_arithmetic", True, [0.5, 0.5]),  # factors of task vectors are no shares
        ((2.0, -1.0), "task_arithmetic", True, [1.0]),  # nor who is subtracted
        ((-1.0, -1.0), "task_arithmetic", True, [1.0]),  # then the base is
        ((0.0, 0.0), "task_arithmetic", True, [0.5, 0.5]),
    ],
)
def test_whom_a_merge_should_be_near_to(
    weights: tuple[float, ...], method: str, base: bool, voices: list[float]
) -> None:
    told = members(weights, method, base)
    found = _voices(told)
    assert [share for _, share in found] == pytest.approx(voices)
    if weights == (2.0, -1.0):
        assert found[0][0] is told.models[0]
    if weights == (-1.0, -1.0):
        assert found[0][0] is told.base


def state(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {**nn.Linear(3, 4).state_dict(), "steps": torch.tensor(seed)}


def test_tensor_by_tensor_is_the_average_and_what_cannot_be_averaged_is_the_firsts() -> None:
    settings = MergeSettings.of(get_method("linear"), 2, ["weight", "bias"], weights=(0.25, 0.75))
    states = [state(0), {**state(1), "bias": torch.zeros(5)}]
    found = dict(merged_tensors(states, settings, skip=["nothing*"]))
    assert list(found) == ["weight", "bias", "steps"]
    torch.testing.assert_close(found["weight"], 0.25 * states[0]["weight"] + 0.75 * states[1]["weight"])
    assert torch.equal(found["bias"], states[0]["bias"]) and found["steps"] == 0  # other shape; no number to average
    kept = dict(merged_tensors(states, settings, skip=["wei*"]))
    assert torch.equal(kept["weight"], states[0]["weight"]) and kept["weight"] is not states[0]["weight"]


@pytest.mark.parametrize(("change", "same"), [(0.0, True), (1e-8, True), (1e-3, False)])
def test_a_merge_is_the_first_model_up_to_rounding(change: float, same: bool) -> None:
    one, two = state(0), {k: v * (1 + change) if v.is_floating_point() else v for k, v in state(0).items()}
    settings = MergeSettings.of(get_method("linear"), 2, ["weight", "bias"])
    named = {k: k for k in one}
    made = [Member(cast(Any, SimpleNamespace(state=lambda s=s: s, names=named, called=named))) for s in (one, two)]
    assert _is_the_first(Members(made, None, settings), ()) is same
