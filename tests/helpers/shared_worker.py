"""Run by `accelerate launch` in test_processes.py: plan, merge and barrier of a pair, from one process or more."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

import mergeid
from mergeid.basics import processes

EXAMPLES = 1003


def write_partner(folder: Path, kind: Any) -> None:
    """`b`: the scrambled copy of `a`, with noise."""
    mergeid.scramble(folder / "a", output=folder / "b", seed=3)
    other = kind.from_pretrained(folder / "b")
    with torch.no_grad():
        for p in other.parameters():
            p += 0.05 * p.std(correction=0) * torch.randn_like(p)
    other.save_pretrained(folder / "b")


def write_pair(folder: Path) -> None:
    """A small network with BatchNorm, its scrambled copy with noise, and examples with labels."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1], layer_type="basic", num_labels=4, id2label=None
    )
    model = ResNetForImageClassification(config).eval()
    model.save_pretrained(folder / "a")
    write_partner(folder, ResNetForImageClassification)
    generator = np.random.default_rng(1)
    np.savez(
        folder / "data.npz",
        pixel_values=generator.standard_normal((EXAMPLES, 3, 16, 16), np.float32),
        labels=generator.integers(4, size=EXAMPLES),
    )


def results(folder: Path, output: Path) -> dict[str, Any]:
    a, b, data = folder / "a", folder / "b", folder / "data.npz"
    how: dict[str, Any] = {"data": data, "limit": None}
    plan = mergeid.plan(a, b, **how).to_json()
    always = mergeid.plan(a, b, match="always", **how).to_json()
    weights = mergeid.plan(a, b).to_json()
    merge = mergeid.merge(a, b, output=output, force=True, **how).to_json()
    refitted = output.with_name(f"{output.name}-solved")
    solved = mergeid.merge(a, b, repair="solve", output=refitted, force=True, **how)
    curve = mergeid.barrier(a, b, data=data, match="auto", repair=True, points=5, calibration_limit=None).to_json()
    for known in ("seconds", "report", "files"):
        merge.pop(known, None)
    said = {"plan": plan, "always": always, "weights": weights, "merge": merge, "barrier": curve}
    return {**said, "solved": solved.to_json()["repair"]}


if __name__ == "__main__":
    folder, output, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    accelerator = Accelerator()
    assert accelerator.num_processes == count, f"{accelerator.num_processes} processes"
    with processes.together():
        assert processes.place() == (accelerator.process_index, count)
        found = results(folder, output)
    if accelerator.is_main_process:
        output.with_suffix(".json").write_text(json.dumps(found))
    accelerator.wait_for_everyone()  # a process that ends while another still talks to it aborts
    accelerator.end_training()
