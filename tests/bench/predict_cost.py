"""What a prediction costs: beside measuring the curve that it predicts, and of all pairs among many sketches.

    python tests/bench/predict_cost.py [--arch resnet18] [--size 32] [--examples 1024] [--models 50]

CPU seconds on one thread, of ResNet-18 with random weights (what is computed does not depend on them). The curve has 11
points on the same inputs, without matching or repair; predicting includes matching. Sketches are of networks that have
nothing in common, which is the slowest case for matching.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import mergeid as m
from mergeid.prediction.sketch import Sketch


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    found = work()
    return time.process_time() - began, found


def network(arch: str, seed: int) -> nn.Module:
    import timm

    torch.manual_seed(seed)
    return timm.create_model(arch, num_classes=10).eval()


def unlike(sketch: Sketch, seed: int) -> Sketch:
    """The sketch of a network that has nothing in common with it, without running one."""
    other, generator = copy.copy(sketch), torch.Generator().manual_seed(seed)
    other.activations = {k: torch.randn(v.shape, generator=generator) for k, v in sketch.activations.items()}
    other.logits = torch.randn(sketch.logits.shape, generator=generator)
    return other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--size", type=int, default=32, help="side of the images")
    parser.add_argument("--examples", type=int, default=1024)
    parser.add_argument("--models", type=int, default=50)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    a, b = network(options.arch, 0), network(options.arch, 1)
    images = torch.randn(options.examples, 3, options.size, options.size)
    data = {"x": images, "labels": torch.randint(10, (options.examples,))}
    how = {"data": data, "arch": f"timm/{options.arch}"}

    sketching, first = cpu_seconds(lambda: m.sketch(a, **how))
    sketches = [first, *(unlike(first, seed) for seed in range(1, options.models))]
    comparing, matrix = cpu_seconds(lambda: m.predict_sketches(sketches))
    print(
        f"one sketch: {sketching:.1f} s; {len(matrix.pairs)} pairs among {options.models} sketches: {comparing:.1f} s"
    )

    predicting, _ = cpu_seconds(lambda: m.predict(a, b, **how))
    measuring, _ = cpu_seconds(lambda: m.barrier(a, b, device="cpu", **how))
    print(f"predicting: {predicting:.1f} s; measuring 11 points: {measuring:.1f} s; {predicting / measuring:.0%}")


if __name__ == "__main__":
    main()
