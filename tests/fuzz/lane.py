"""Where inputs run: a long-lived worker, or a process each; with a watchdog that ends what hangs."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from .case import Case
from .oracle import Ran

LIMIT = 20.0
"""Seconds that an input may take; what the process waits for a busy processor is not counted."""
MEMORY = 4
"""GB beside the libraries' own."""
RUNS = 3000
"""Inputs of one worker, whose libraries keep some memory of each."""
STREAM = 1 << 20
"""Bytes of a stream that are read."""


class Lane:
    """Runs inputs one after the other.

    Args:
        home: folder for caches, streams and temporary files; must exist.
        env: environment of the campaign.
    """

    def __init__(self, home: Path, env: dict[str, str]) -> None:
        self.home = home
        self.temporary = home / "tmp"
        self.temporary.mkdir(parents=True, exist_ok=True)
        self.env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(home / "hf"),
            "MPLCONFIGDIR": str(home / "mpl"),
            "XDG_CACHE_HOME": str(home / "cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(home / "inductor"),
            "TMPDIR": str(self.temporary),
            "PYTHONDONTWRITEBYTECODE": "1",
            "COLUMNS": "100",
            "PYTHONPATH": os.pathsep.join(p for p in (_root(), os.environ.get("PYTHONPATH")) if p),
            **env,
        }
        self._worker: subprocess.Popen[str] | None = None
        self._runs = 0

    def run(self, case: Case, folder: Path, *, alone: bool) -> Ran:
        """One input, in the worker or in a process of its own (`alone`)."""
        ran = self._alone(case, folder) if alone else self._inside(case, folder)
        left = tuple(sorted(p.name for p in self.temporary.iterdir()))
        for name in left:
            path = self.temporary / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        return Ran(ran.code, ran.out, ran.err, ran.seconds, left)

    def close(self) -> None:
        if self._worker is not None:
            _kill(self._worker)
            self._worker = None

    def _alone(self, case: Case, folder: Path) -> Ran:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            began = time.monotonic()
            process = subprocess.Popen(
                [sys.executable, "-m", "mergeid", *case.words],
                cwd=folder,
                env={**self.env, **case.env},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                preexec_fn=_bounded,
            )
            code, starved = _wait(process)
            if code is None:
                _kill(process)
            return Ran(code, _text(out), _text(err), time.monotonic() - began - starved)

    def _inside(self, case: Case, folder: Path) -> Ran:
        worker = self._started()
        streams = {k: str(self.home / k) for k in ("out", "err")}
        job = {"words": case.words, "folder": str(folder), "env": case.env, **streams}
        assert worker.stdin is not None and worker.stdout is not None
        began, starved = time.monotonic(), _starved(worker.pid)
        worker.stdin.write(json.dumps(job) + "\n")
        worker.stdin.flush()
        answer = _line(worker, began - starved)
        seconds = time.monotonic() - began - (_starved(worker.pid) - starved)
        self._runs += 1
        out, err = (_text(open(streams[k], "rb")) for k in ("out", "err"))  # noqa: SIM115
        if answer is None or self._runs >= RUNS:
            self.close()
        if answer is None:
            return Ran(None, out, err, seconds)
        if answer == "":
            code = worker.wait()
            self.close()
            return Ran(code, out, err, seconds)
        return Ran(json.loads(answer)["code"], out, err, seconds)

    def _started(self) -> subprocess.Popen[str]:
        if self._worker is None:
            self._runs = 0
            self._worker = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("worker.py")), str(MEMORY)],
                env=self.env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            assert self._worker.stdout is not None
            if self._worker.stdout.readline() != "ready\n":
                raise RuntimeError("the worker does not start; run python -m mergeid --help and see why")
        return self._worker


def _root() -> str:
    """The project's own tree comes before an installed one."""
    root = Path(__file__).parents[2]
    return os.pathsep.join((str(root), str(root / "adapters")))


def _bounded() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**30,) * 2)


def _kill(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _starved(pid: int) -> float:
    """Seconds for which a process was ready to run and did not get a processor."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def _wait(process: subprocess.Popen[bytes]) -> tuple[int | None, float]:
    """Exit code (None: none in time), and the seconds that it waited for a processor."""
    began, starved = time.monotonic(), 0.0
    while time.monotonic() - began - starved <= LIMIT:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=0.5), starved
        starved = _starved(process.pid)
    return None, starved


def _line(worker: subprocess.Popen[str], since: float) -> str | None:
    """The worker's answer; None: none in time; empty: it died. `since`: when, less what it had been starved by then."""
    assert worker.stdout is not None
    with selectors.DefaultSelector() as ready:
        ready.register(worker.stdout, selectors.EVENT_READ)
        while not ready.select(timeout=1):
            if time.monotonic() - _starved(worker.pid) - since > LIMIT:
                return None
    return worker.stdout.readline()


def _text(file: IO[bytes]) -> str:
    with file if isinstance(file.name, str) else contextlib.nullcontext():
        file.seek(0)
        return file.read(STREAM).decode("utf-8", "surrogateescape")
