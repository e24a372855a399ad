"""What Python shows of a result fits on a line or two, whatever lies in it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mergeid
from mergeid.results.comparison import shown
from mergeid.results.extract import ExtractResult


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)).eval()


def test_results_are_shown_in_short() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    a, b, data = network(0), network(1), [{"arg0": row} for row in x]
    plan = mergeid.plan(a, b, data=data, example_inputs=x[:2])
    merged = mergeid.merge(a, b, data=data, example_inputs=x[:2], force=True)
    predicted = mergeid.predict(a, b, data=data, example_inputs=x[:2])
    shown = [repr(each) for each in (plan, plan.graph, plan.graph.spaces, merged, predicted)]
    assert all(len(text) < 250 and "array" not in text and "tensor(" not in text for text in shown)
    assert f"verdict={plan.verdict!r}" in shown[0] and "1 spaces on 4 tensors, verified" in shown[1]
    assert "state=4 tensors" in shown[3] and f"{predicted.outlooks[0].label}: " in shown[4]


def test_small_and_large_figures_are_said_in_plain_digits() -> None:
    """A refusal said 1.35e+05, an extraction 6.2e-06 %."""
    said = {1e-9: "less than 0.01 %", 2e-4: "0.02 %", 0.0312: "3.1 %"}
    assert {error: ExtractResult(8, error=error).left_out for error in said} == said
    assert [shown(value) for value in (0.0123, 12.5, 135_000.0)] == ["0.012", "12.500", "135,000"]


@pytest.mark.parametrize(
    ("distance", "text"),
    [(-4e-4, "0.000"), (-0.0, "0.000"), (4e-4, "0.000"), (-0.0126, "-0.013"), (1.8, "1.800"), (float("inf"), "inf")],
)
def test_distances_next_to_nothing_have_no_sign(distance: float, text: str) -> None:
    assert shown(distance) == text
