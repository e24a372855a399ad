"""How many inputs does a solved merge need, does the match before it still pay, and what if they are of another kind?

    apt-get install dataset-fashion-mnist
    python examples/inputs.py --out inputs

takes the pairs of `no_barrier.py` (and its folder of trained networks, --networks) and writes table.md: nats lost by
the merge at the midpoint against the mean of the two networks.

- matched, or as is: `--match always` or `never`, then `--repair solve`, with 64 to 4,096 unlabelled training images
  that neither network was trained on;
- default: what `merge --data` makes of 512 images of another kind, beside what matching and repairing (BatchNorm, or
  REPAIR where there is none) or solving on them would have made: digits (scikit-learn's, at the same size) or noise;
- alone: what `merge` makes of the weights alone.

What is measured is kept in the output folder: a second run goes on where the first one was stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from no_barrier import SEEDS, Task, begun, images, measured, merged, normed, trained
from torch import Tensor, nn
from torch.nn import functional as F

import mergeid
from mergeid.errors import MergeidError

FAMILIES = ("test_convnext", "test_byobnet", "test_vit")
COUNTS = (64, 256, 512, 1024, 4096)
OTHERS = ("digits", "noise")
FORMS = ("default", "repaired", "solved")


def more_images() -> Tensor:
    """Training images from the 20,000th on, [4096, 1, 32, 32]: of the kind that the networks were trained on."""
    return images("test_convnext", known=max(COUNTS)).known[0]


def other_images(kind: str, count: int = 512) -> Tensor:
    """Images of another kind, in the place and range of the training images, [count, 1, 32, 32]."""
    if kind == "noise":
        return torch.randn(count, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    from sklearn.datasets import load_digits

    pixels = torch.from_numpy(load_digits().images[:count]).float()[:, None] / 16
    return F.pad((F.interpolate(pixels, size=28, mode="bilinear") - 0.286) / 0.353, (2, 2, 2, 2), value=-0.81)


def loss_of(task: Task, a: nn.Module, b: nn.Module, x: Tensor, **how: Any) -> float:
    """Loss of the merge; NaN where mergeid refuses."""
    try:
        return measured(task, merged(task, a, b, x, **how))
    except MergeidError:
        return float("nan")


def table(results: dict[str, dict[str, float]]) -> str:
    lines = []
    counts = [(f"{m} {n:,}", f"{m} {n}") for m in ("matched", "as is") for n in COUNTS]
    for title, keys in (
        ("Inputs of the networks' own kind, solved", counts),
        (
            "512 inputs of another kind",
            [("weights alone", "alone"), *((f"{k}, {w}", f"{k} {w}") for k in OTHERS for w in FORMS)],
        ),
    ):
        lines += [f"\n{title}\n", "| | " + " | ".join(k for k, _ in keys) + " |", "|---" * (len(keys) + 1) + "|"]
        for name, found in results.items():
            cells = ["" if k not in found else _said(found[k] - found["ends"]) for _, k in keys]
            lines.append("| " + " | ".join((name, *cells)) + " |")
    return "\n".join(lines) + "\n"


def _said(lost: float) -> str:
    return "refused" if lost != lost else f"{lost:+.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("inputs"))
    parser.add_argument("--networks", type=Path, help="trained networks of no_barrier.py (default: OUT)")
    options = parser.parse_args()
    file, results = begun(options.out)
    own = more_images()
    for name in FAMILIES:
        task = images(name)
        a, b = (trained(task, name, seed, options.networks or options.out) for seed in SEEDS)
        found = results.setdefault(name, {})
        work: list[tuple[str, Tensor, dict[str, Any]]] = [
            (f"{k} {n}", own[:n], {"match": m, "repair": "solve", "force": True, "limit": n})
            for k, m in (("matched", "always"), ("as is", "never"))
            for n in COUNTS
        ]
        for kind in OTHERS:
            x = other_images(kind)
            work.append((f"{kind} default", x, {}))
            how = {"match": "always", "force": True}
            work.append((f"{kind} repaired", x, {**how, "repair": "bn" if normed(a) else "repair"}))
            work.append((f"{kind} solved", x, {**how, "repair": "solve"}))
        if "alone" not in found:
            alone = copy.deepcopy(a)
            alone.load_state_dict(mergeid.merge(a, b, example_inputs={task.key: own[:2]}, force=True).state)
            found["alone"] = measured(task, alone)
        found.setdefault("ends", (measured(task, a) + measured(task, b)) / 2)
        for key, x, how in work:
            if key not in found:
                found[key] = loss_of(task, a, b, x, **how)
                print(f"{name} {key}: {found[key] - found['ends']:+.3f}", flush=True)
                file.write_text(json.dumps(results, indent=1))
                (options.out / "table.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
