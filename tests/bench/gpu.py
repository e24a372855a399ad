"""All checks that need a GPU: every verb on it and on the CPU, with the results side by side.

    python tests/bench/gpu.py [--device cuda] [--tolerance 0.001] [CASE …]

The cases are those of `tests/helpers/device_cases.py`. Exits with 1 where a result differs or a case fails. Without a
GPU it says so and exits with 0.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))


def run(case: Callable[[Path, str], Any], folder: Path, device: str) -> tuple[Any, float]:
    """What a case finds on a device, and its seconds."""
    AcceleratorState._reset_state(reset_partial_state=True)  # which keeps to one device
    began = time.perf_counter()
    return case(folder, device), time.perf_counter() - began


def main() -> int:
    from device_cases import CASES, differences, write_pairs

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="default: all", metavar="CASE")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("There is no GPU here, so nothing was checked.")
        return 0
    warnings.simplefilter("ignore")
    wrong, began = 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(folder)
        print(f"{'case':<26} {'CPU, s':>7} {'device, s':>9}  result")
        for case in options.cases or CASES:
            seconds: list[float] = []
            try:
                found = []
                for device in ("cpu", options.device):
                    result, took = run(CASES[case], folder, device)
                    found.append(result)
                    seconds.append(took)
                said = list(differences(*found, options.tolerance))
            except Exception as error:  # the next case may tell more
                said = [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]]
                traceback.print_exc(limit=-4)
            wrong += bool(said)
            shown = [f"{s:.1f}" for s in seconds] + ["-"] * (2 - len(seconds))
            result = f"{len(said)} wrong, {'; '.join(said[:2])}" if said else "same"
            print(f"{case:<26} {shown[0]:>7} {shown[1]:>9}  {result}", flush=True)
    print(f"{wrong} of {len(options.cases or CASES)} cases differ; {time.perf_counter() - began:.0f} s in all")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
