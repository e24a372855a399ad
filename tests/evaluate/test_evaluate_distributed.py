"""The same curve from 1, 2 and 3 processes of `accelerate launch`, BatchNorm re-estimation included."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from evaluate_worker import curve

HERE = Path(__file__).parents[1] / "helpers"


@pytest.fixture(scope="module")
def here() -> dict:
    return {size: curve(size, batch_size=17) for size in (None, 10)}


def launch_options(processes: int) -> list[str]:
    """`accelerate launch --cpu --num_processes N` starts one process only, whatever N (Accelerate 1.15, without MPI);
    N processes on CPUs come from the launcher of --multi_gpu with ACCELERATE_USE_CPU set. The worker counts them."""
    if processes == 1:
        return ["--cpu", "--num_processes", "1"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", str(port)]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_number_of_processes_does_not_show(processes, here, tmp_path):
    output = tmp_path / "curves.json"
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch_options(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [str(HERE / "evaluate_worker.py"), str(output), str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(output.read_text())
    for name, size in (("one calibration batch", None), ("many calibration batches", 10), ("read back", None)):
        assert found[name]["losses"] == pytest.approx(here[size]["losses"], rel=1e-9, abs=0), name
        assert found[name]["accuracies"] == here[size]["accuracies"]
        assert found[name]["count"] == 1003
    assert found["resumed"] == found["read back"] == found["one calibration batch"]
