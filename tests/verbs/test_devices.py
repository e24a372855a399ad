"""Every verb on a device that is not the CPU: no tensor on the wrong one, and the results of the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from device_cases import CASES

WORKER = Path(__file__).parents[1] / "helpers" / "device_worker.py"


def wrong(folder: Path, *names: str) -> dict[str, list[str]]:
    """What differs from the CPU, case by case, in a process of its own: torch learns of a device for good."""
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder), *names], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_every_verb_on_a_pretended_device(tmp_path: Path) -> None:
    found = wrong(tmp_path)
    assert found.keys() == CASES.keys() and not {name: lines[-5:] for name, lines in found.items() if lines}


@pytest.mark.slow
def test_a_tensor_on_the_wrong_device_is_noticed() -> None:
    script = """
import sys
import torch
from pretended import NAME, pretend

with pretend():
    there = torch.ones(3, device=NAME)
    for wrong in (lambda: there + torch.ones(3), lambda: there.numpy(),
                  lambda: torch.rand(3, device=NAME, generator=torch.Generator())):
        try:
            wrong()
            sys.exit("it was not noticed")
        except (RuntimeError, TypeError):
            pass
    assert (there + 1).sum().item() == 6 and there[1:].tolist() == [1.0, 1.0]
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=WORKER.parent
    )
    assert done.returncode == 0, done.stderr
