"""What solving a merge costs beside running both models: python tests/bench/solve_cost.py [--model resnet50]

Random weights, random images; one thread; CPU seconds and the largest memory. A row is kept in
``tests/bench/tables/solve_cost.csv``.
"""

from __future__ import annotations

import argparse
import csv
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

from mergeid.repair.solve import solve_network

TABLE = Path(__file__).parent / "tables" / "solve_cost.csv"
COLUMNS = ("model", "images", "side", "forward_seconds", "solve_seconds", "times_forward", "changed_layers", "peak_mb")


@dataclass(frozen=True)
class Cost:
    """Seconds of both models' forward passes, and of solving; CPU seconds, of other devices wall seconds. Layers that
    were changed."""

    forward: float
    solve: float
    changed: int


def cost(model: str, count: int, side: int, batch: int, device: str = "cpu") -> Cost:
    """Of random networks on `count` random images.

    Args:
        batch: images at once.
    """
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(timm.create_model(model, num_classes=10).eval().to(device))
    merged = timm.create_model(model, num_classes=10).eval().to(device)
    states = [m.state_dict() for m in models]
    average = {k: (v + states[1][k]) / 2 if v.is_floating_point() else v for k, v in states[0].items()}
    merged.load_state_dict(average)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, side, side, generator=generator).to(device)
    batches: list[dict[str, Any]] = [{"x": part} for part in images.split(batch)]

    def seconds() -> float:
        if device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    with torch.no_grad():
        if device != "cpu":  # what a device prepares once
            models[0](batches[0]["x"])
            torch.linalg.cholesky(torch.eye(8, dtype=torch.float64, device=device))
        began = seconds()
        for net in models:
            for each in batches:
                net(each["x"])
    forward, began = seconds() - began, seconds()
    done = solve_network(merged, models, [0.5, 0.5], lambda m, b: m(b["x"]), batches)
    return Cost(forward, seconds() - began, sum(d.ridge < float("inf") for d in done))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = cost(given.model, given.images, given.side, given.batch)
    forward, solve = found.forward, found.solve
    row = (given.model, given.images, given.side, f"{forward:.1f}", f"{solve:.1f}", f"{solve / forward:.1f}")
    row += (found.changed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    print(dict(zip(COLUMNS, row, strict=True)))
    known = list(csv.DictReader(TABLE.open(encoding="utf-8"))) if TABLE.exists() else []
    kept = [r for r in known if (r["model"], r["images"], r["side"]) != tuple(map(str, row[:3]))]
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([*kept, dict(zip(COLUMNS, row, strict=True))])


if __name__ == "__main__":
    main()
