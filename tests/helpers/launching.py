"""Programs under `accelerate launch`, on the CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence


def launch_options(processes: int) -> list[str]:
    """`accelerate launch --cpu --num_processes N` starts one process only, whatever N (Accelerate 1.15, without MPI);
    N processes on CPUs come from the launcher of --multi_gpu with ACCELERATE_USE_CPU set. The worker counts them."""
    if processes == 1:
        return ["--cpu", "--num_processes", "1"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", str(port)]


def launched(processes: int, words: Sequence[str], timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run ``words`` (a script, or ``-m`` and a module, with arguments) in so many processes of one thread."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch_options(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
