"""Two trained networks: the barrier as they are and aligned, how far their neurons correspond, layer by layer, and what
mergeid says of them."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan
from pathlib import Path

import numpy as np
import torch
from certificate import Margins, margins
from nets import hidden, plain
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from train import Setting, state

import mergeid
from mergeid.evaluate.interpolate import Line, Measuring, Reestimate, barrier_curve
from mergeid.models.examples import Examples as Given
from mergeid.plugins import Batch, LossParts

POINTS = 11
CALIBRATION = 512
"""Training examples that the matcher (and BatchNorm) sees."""


class Examples(Dataset):
    """Examples as mergeid takes them: ``{"arg0": input, "labels": class}``."""

    def __init__(self, x: Tensor, labels: Tensor) -> None:
        self.x, self.labels = x, labels

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Batch:
        return {"arg0": self.x[index], "labels": self.labels[index]}


@dataclass(frozen=True)
class Curve:
    """Test loss (nats) and accuracy at `POINTS` points from A to B."""

    loss: list[float]
    accuracy: list[float]
    barrier: float


@dataclass(frozen=True)
class Objective:
    """Mean correlation of paired neurons of one layer: as they lie, under the best assignment, at random."""

    identity: float
    optimal: float
    random: float


@dataclass(frozen=True)
class Evidence:
    """What mergeid says of the pair before anything is merged, by depth.

    Attributes:
        verdict: of its plan. decisions: one letter per space: d(irect), m(atch), w(ill not merge).
        iota, low, high: identifiability index with its interval; NaN where the activations do not give one.
        structure: the margins of both networks, see `certificate`; None where they have no fixed part.
    """

    verdict: str
    decisions: str
    iota: list[float]
    low: list[float]
    high: list[float]
    structure: tuple[Margins, Margins] | None


def measure(
    setting: Setting, seeds: tuple[int, int], cache: Path
) -> tuple[dict[str, Curve], list[Objective], Evidence]:
    """({"unaligned": …, "aligned": …}, objectives by depth, evidence) of a pair, trained first if need be."""
    split = setting.split()
    models = []
    for seed in seeds:
        model = plain(setting.net, setting.inputs, setting.budget.width)
        model.load_state_dict(state(setting, seed, cache))
        models.append(model)
    calibration = Examples(split.x[:CALIBRATION], split.labels[:CALIBRATION])
    plan = mergeid.plan(*models, data=calibration, example_inputs=split.x[:2])
    assert plan.matched is not None
    own = models[1].state_dict()
    test = Examples(split.test_x, split.test_labels)
    curves = {
        name: _curve(models[0], b, test, calibration, repair=setting.net == "resnet")
        for name, b in (("unaligned", own), ("aligned", plan.graph.apply_state(plan.matched, own)))
    }
    evidence = Evidence(
        plan.verdict,
        "".join(s.decision[0] for s in plan.spaces),
        *([nan if (v := getattr(s, n)) is None else v for s in plan.spaces] for n in ("iota", "iota_low", "iota_high")),
        margins(setting, seeds, cache, CALIBRATION),
    )
    return curves, objectives(models[0], models[1], split.test_x[: 2 * CALIBRATION]), evidence


def _curve(a: nn.Module, b: dict[str, Tensor], test: Examples, calibration: Examples, repair: bool) -> Curve:
    grid = tuple(np.linspace(0, 1, POINTS).tolist())
    found = barrier_curve(
        Line(a.state_dict(), b, a, lambda model, batch: model(batch["arg0"]), _loss, grid),
        Given(test),
        Measuring(batch_size=500),
        repair=Reestimate(Given(calibration)) if repair else None,
    )
    return Curve(list(found.losses), list(found.accuracies or ()), found.barrier)


def _loss(output: Tensor, batch: Batch) -> LossParts:
    labels = batch["labels"]
    right = (output.argmax(1) == labels).long()
    return LossParts(F.cross_entropy(output, labels, reduction="none"), right, torch.ones_like(labels))


def objectives(a: nn.Module, b: nn.Module, x: Tensor) -> list[Objective]:
    """J of every hidden layer, on inputs that neither network was trained on. Convolutional activations count at
    every place."""
    found = []
    for first, second in zip(_activations(a, x), _activations(b, x), strict=True):
        n = first.shape[1]
        scale = [np.where(v.std(0) > 0, v.std(0), 1.0) for v in (first, second)]
        r = ((first - first.mean(0)) / scale[0]).T @ ((second - second.mean(0)) / scale[1]) / len(first)
        rows, columns = linear_sum_assignment(r, maximize=True)
        found.append(Objective(float(np.trace(r)) / n, float(r[rows, columns].mean()), float(r.mean())))
    return found


def _activations(model: nn.Module, x: Tensor) -> list[np.ndarray]:
    """float64 [rows, neurons] of every hidden layer."""
    kept: list[np.ndarray] = []

    def keep(module: nn.Module, args: object, output: Tensor) -> None:
        kept.append(output.movedim(1, -1).reshape(-1, output.shape[1]).double().numpy())

    handles = [model.get_submodule(name).register_forward_hook(keep) for name in hidden(model)]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return kept
