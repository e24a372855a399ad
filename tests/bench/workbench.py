"""How long opening, building, tracing and proving take for N models and a base, once each and once a pair.

    python tests/bench/workbench.py [ARCHITECTURE]

"Once a pair" is what mergeid did before it had a workbench: every pair of the first model with another was opened,
built, traced and proven by itself.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from mergeid.models.workbench import Workbench
from mergeid.request.request import Reading, Run
from mergeid.stages.open import open_models, pair_of

COUNTS = (2, 3, 5, 9)


def once(files: list[Path], reading: Reading) -> float:
    """Seconds with one workbench for all."""
    start = time.perf_counter()
    met = open_models(Workbench(reading, Run()), files[1:], files[0])
    for other in met.everyone[1:]:
        pair_of(met, other)
    return time.perf_counter() - start


def each(files: list[Path], reading: Reading) -> float:
    """Seconds with one for every pair."""
    start = time.perf_counter()
    for other in (*files[2:], files[0]):
        met = open_models(Workbench(reading, Run()), [files[1], other])
        pair_of(met, met.models[1])
    return time.perf_counter() - start


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "test_resnet"
    reading = Reading(f"timm/{name}")
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for i in range(max(COUNTS) + 1):
            torch.manual_seed(i)
            files.append(Path(folder) / f"{i}.safetensors")
            save_file(timm.create_model(name).state_dict(), files[-1])
        once(files[:3], reading)  # imports
        print(f"{name}: models and a base | once (s) | once a pair (s) | ratio")
        for n in COUNTS:
            a, b = once(files[: n + 1], reading), each(files[: n + 1], reading)
            print(f"{n} + 1 | {a:.2f} | {b:.2f} | {a / b:.2f}")


if __name__ == "__main__":
    main()
