"""Runs the real command in a process of its own, and says what it left behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PROGRESS = re.compile(r"^mergeid: (on trial: )?[\w .()-]+( \([\d hmins]+ left\))?(: \d+ %)?$")
"""Plain progress, which a slow machine adds to stderr."""


@dataclass(frozen=True)
class Done:
    """What a command did: exit code, both streams, and the files that were not there before."""

    code: int
    stdout: str
    stderr: str
    written: list[str]

    @property
    def lines(self) -> list[str]:
        """Lines of stderr without progress."""
        return [line for line in self.stderr.splitlines() if not PROGRESS.match(line)]


def files_in(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything below a folder."""
    return {
        str(p.relative_to(folder)): (p.stat().st_size if p.is_file() else 0, p.stat().st_mtime_ns if p.is_file() else 0)
        for p in sorted(folder.rglob("*"))
    }


def mergeid(*words: object, cwd: Path, columns: int = 80, before: Callable[[], None] | None = None, **env: str) -> Done:
    """``python -m mergeid …`` in `cwd`.

    Args:
        columns: width of the terminal.
        before: called in the child process before the command starts (limits, capabilities).
    """
    there = files_in(cwd)
    done = subprocess.run(
        [sys.executable, "-m", "mergeid", *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        preexec_fn=before,
        timeout=900,  # for what hangs; the demo trains for minutes on a busy machine
        env={**os.environ, "COLUMNS": str(columns), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env},
    )
    after = files_in(cwd)
    return Done(done.returncode, done.stdout, done.stderr, [name for name in after if after[name] != there.get(name)])
