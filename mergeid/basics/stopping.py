"""Signals that end the command (Ctrl-C, SIGTERM, SIGHUP): what is temporary goes, nothing is printed, and the process
ends with 128 plus the number of the signal.

An exception would not do: code of other libraries may catch it, and while modules are imported or the interpreter ends
it shows as a traceback. So the handler itself cleans up and ends the process. Only the command installs it; in a
program that uses mergeid, signals are that program's own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
TRIES = 200
"""Times that what is temporary is removed before the process ends."""

_temporary: dict[Path, None] = {}
_held = 0
_pending: int | None = None
_ending = False


def install() -> None:
    """From now on the signals end this process cleanly; one that the caller lets it ignore (nohup) stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _numbers():
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def note(path: Path) -> Path:
    """A file or folder about to be made, to be removed if the process is stopped."""
    if _ending:
        raise KeyboardInterrupt
    _temporary[path] = None
    return path


def forget(path: Path) -> Path:
    """It is to stay where the process is stopped."""
    _temporary.pop(path, None)
    return path


def remove(path: Path) -> None:
    """Remove a temporary file or folder, if it is there, and forget it."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    _temporary.pop(path, None)


class TemporaryFolder(tempfile.TemporaryDirectory[str]):
    """A folder that goes at the end of a ``with`` block, with the object, or where the process is stopped.

    Args:
        beside: the folder in which it lies, hidden; None: where temporary files lie.
    """

    def __init__(self, beside: Path | None = None) -> None:
        with uninterrupted():
            super().__init__(prefix="mergeid-" if beside is None else ".mergeid-", dir=beside)
            note(Path(self.name))

    def cleanup(self) -> None:
        """It goes now."""
        super().cleanup()
        forget(Path(self.name))


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals wait until the end of this block: for the few renames that belong together."""
    global _held
    _held += 1
    try:
        yield
    finally:
        _held -= 1
        if not _held and _pending is not None:
            _end(_pending)


def _numbers() -> list[signal.Signals]:
    return [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


def _stop(number: int, frame: FrameType | None) -> None:
    global _pending
    if _held:
        _pending = number
    else:
        _end(number)


def _out_of_reach(path: Path) -> Path:
    """Under another name no thread finds it, however fast it writes."""
    away = path.with_name(f"{path.name}-{os.getpid()}")
    try:
        path.rename(away)
    except OSError:
        return path
    return away


def _end(number: int) -> None:
    global _ending
    _ending = True
    for other in _numbers():
        signal.signal(other, signal.SIG_IGN)
    left = [_out_of_reach(path) for path in _temporary]
    for _ in range(TRIES):  # a folder into which another thread has put a file meanwhile is not gone
        for path in left:
            remove(path)
        left = [path for path in left if os.path.lexists(path)]
        if not left:
            break
        time.sleep(0.01)
    with contextlib.suppress(OSError):
        if os.isatty(2):
            os.write(2, b"\r\x1b[K\x1b[?25h")  # the bar of progress goes, and the cursor that it hid is back
    os._exit(128 + number)
