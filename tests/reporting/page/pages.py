"""A report to look at: a real plan of two small networks, with curves and files made up for the test."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import nn

import mergeid
from mergeid.prediction.model import Interval
from mergeid.reporting.page import FileRecord, Measured, Report
from mergeid.results.barrier import BarrierResult
from mergeid.results.prediction import Outlook, PredictResult

LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def curve(label: str, *losses: float, repair: bool = False) -> BarrierResult:
    return BarrierResult(LAMBDAS, losses, tuple(max(0.1, 1 - x / 2) for x in losses), 500, repair, label=label)


SOLVED = BarrierResult((0.0, 0.3, 0.5, 0.7, 1.0), (0.1, 0.11, 0.115, 0.12, 0.12), (0.95, 0.94, 0.94, 0.94, 0.94), 500,
                       label="solved", solved=True)  # fmt: skip


@cache
def plan() -> object:
    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)).eval()

    inputs = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    made = mergeid.plan(network(0), network(1), data=[{"arg0": x} for x in inputs], example_inputs=inputs[:2])
    # one space of each kind, so that the filters have something to do
    return replace(made, spaces=[replace(made.spaces[0], decision="direct"), replace(made.spaces[1], decision="match")])


def report() -> Report:
    ways = [("direct", 0.9, 3.0), ("matched", 0.01, 0.4)]
    outlooks = [Outlook(name, False, Interval(x, x / 2, 2 * x, 0.0, 0.5, 0.0), None, []) for name, x, _ in ways]
    return Report(
        a="a.safetensors",
        b="b.safetensors",
        arch="torch/Sequential",
        plan=plan(),  # type: ignore[arg-type]
        curves=(curve("direct", 0.1, 0.6, 1.3, 0.6, 0.12), curve("matched", 0.1, 0.11, 0.12, 0.12, 0.12), SOLVED),
        solved=(Measured("solved", 0.115, 0.94),),
        prediction=PredictResult("a", "b", "x", "inputs", 64, 0.01, outlooks, None, "1"),
        inputs=(FileRecord("model A", "a.safetensors", "0" * 64, 1234),),
        data="test.npz",
        command="mergeid report a.safetensors b.safetensors --data test.npz",
        versions={"mergeid": "0"},
        notes=("a note",),
    )
