"""Run a command and watch its memory: wall time, and three figures of peak memory (Linux)."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Usage:
    """What one run took. Memory in bytes.

    Attributes:
        seconds: wall time from start to exit, imports included.
        peak: high-water mark of the resident memory, everything included (VmHWM).
        anonymous: highest RssAnon + RssShmem seen: memory that no file backs.
        beyond_inputs: highest resident memory seen that is no mapping of an input file; 0 if not watched.
        cpu: CPU seconds of all its threads, user and system.
    """

    seconds: float
    peak: int
    anonymous: int
    beyond_inputs: int
    cpu: float = 0.0


def run(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    log: Path,
    inputs: Sequence[Path] = (),
    interval: float = 0.02,
) -> Usage:
    """Run `command` to its end, sampling /proc.

    Args:
        inputs: files whose mappings do not count for `Usage.beyond_inputs`. Reading a process's mappings stops it for
            some milliseconds each time, so leave this empty where the time matters.
        interval: seconds between two samples.

    Raises:
        RuntimeError: the command failed; the message ends with its last lines.
    """
    names = {os.path.realpath(path) for path in inputs}
    peak = anonymous = beyond = 0
    with open(log, "wb") as out:
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
        while process.poll() is None:
            values = _status(process.pid)
            peak = max(peak, values.get("VmHWM", 0))
            anonymous = max(anonymous, values.get("RssAnon", 0) + values.get("RssShmem", 0))
            if names:
                beyond = max(beyond, _resident_beyond(process.pid, names))
            time.sleep(interval)
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if process.returncode:
        tail = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{command[0]} failed with exit code {process.returncode}:\n{tail}")
    return Usage(seconds, peak, anonymous, beyond, cpu)


def _status(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    found = (line.split() for line in lines if line.startswith(("VmHWM", "Rss")))
    return {words[0].rstrip(":"): int(words[1]) << 10 for words in found}


def _resident_beyond(pid: int, names: set[str]) -> int:
    """Resident bytes of all mappings but those of the named files."""
    total, counts = 0, True
    try:
        lines = Path(f"/proc/{pid}/smaps").read_text(errors="replace").splitlines()
    except OSError:
        return 0
    for line in lines:
        if line.startswith("Rss:"):
            total += (int(line.split()[1]) << 10) if counts else 0
        elif "-" in line.split(" ", 1)[0]:
            words = line.split(maxsplit=5)
            counts = not (len(words) == 6 and words[5] in names)
    return total
