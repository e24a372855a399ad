"""What Python shows of a result fits on a line or two, whatever lies in it."""

from __future__ import annotations

import torch
from torch import nn

import mergeid


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
