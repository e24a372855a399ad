"""Run by `accelerate launch` in test_evaluate_distributed.py: one barrier curve, written by the main process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from curves import barrier_curve
from evaluate_helpers import Items, forward, loss, net


def curve(calibration_batch: int | None, batch_size: int = 64, resume: Path | None = None) -> dict:
    a, b = net(1), net(2)
    return barrier_curve(
        a.state_dict(),
        b.state_dict(),
        a,
        Items(1003),
        forward=forward,
        loss=loss,
        lambdas=(0, 0.5, 1),
        repair=True,
        calibration=Items(101, seed=1),
        calibration_batch=calibration_batch,
        batch_size=batch_size,
        dtype=torch.float64,
        resume=resume,
    ).to_json()


if __name__ == "__main__":
    output, processes = Path(sys.argv[1]), int(sys.argv[2])
    accelerator = Accelerator()
    assert accelerator.num_processes == processes, f"{accelerator.num_processes} processes"
    results = {
        "one calibration batch": curve(None),
        "many calibration batches": curve(10),
        "resumed": curve(None, resume=output.with_suffix(".points")),
        "read back": curve(None, resume=output.with_suffix(".points")),
    }
    if accelerator.is_main_process:
        output.write_text(json.dumps(results))
    accelerator.end_training()
