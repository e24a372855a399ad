"""What long work has done so far, so that it can go on where it was stopped.

Everything that is made on the way to an output lies in one hidden folder beside it: the output itself as far as it is
written (`STAGED`), what the work keeps between its steps, and the journal, a file of JSON lines. Its first line says
what is made and of what, every further one which step is done. A step counts once it is on the disk. The file is locked
while its process lives, so that nobody takes over work that somebody does.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from mergeid.basics import stopping
from mergeid.errors import MergeidError
from mergeid.io.publish import hidden, sync_folder

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be removed either
    fcntl = None  # type: ignore[assignment]

FORMAT = "mergeid.journal/1"
NAME = "journal.jsonl"
STAGED = "output"
"""Name of the output in the hidden folder, until it is whole."""
_HIDDEN = ".*.mergeid-tmp"


class Journal:
    """The steps that are done of one piece of work.

    Work that can be resumed names its steps, skips those that are `in` the journal, and notes each one when it is done:

        if "block 3" not in journal:
            …
            journal.note("block 3", {"moved": 17})
            journal.commit([file.fileno()])

    Attributes:
        folder: the hidden folder, for whatever is kept between steps; on the output's disk, gone when all is done.
        steps: step -> what was noted of it.
        resumed: whether an earlier process did some of them.
    """

    def __init__(self, output: Path, request: Mapping[str, Any], *, resume: bool = False) -> None:
        """Begin, or go on with what was stopped.

        Args:
            output: what is made, links resolved.
            request: of what it is made and how, as JSON: the same request must always give the same steps.
            resume: go on with work on this output that was stopped, if there is any; and keep what is done where this
                process is stopped by a signal.

        Raises:
            MergeidError: what was stopped had another request, or its process lives.
        """
        self.output = output
        self.steps: dict[str, Any] = {}
        self._request = json.loads(json.dumps(request, sort_keys=True))
        self._noted: list[str] = []
        self._keeps = resume
        found = self._stopped() if resume else None
        self.resumed = found is not None
        if found is not None:
            self.folder, self._file = found
            return
        self.folder = hidden(output)
        if resume:
            stopping.forget(self.folder)
        try:
            self.folder.mkdir()
            self._file = _opened(self.folder / NAME, "x+b")
            _lock(self._file)
            self._append([{"format": FORMAT, "output": output.name, "request": self._request}])
        except BaseException:
            stopping.remove(self.folder)
            raise

    def __contains__(self, step: str) -> bool:
        return step in self.steps

    @property
    def staged(self) -> Path:
        """Where the output is written until it is whole."""
        return self.folder / STAGED

    def note(self, step: str, value: Any = None) -> None:
        """A step is done; it counts from the next `commit` on.

        Args:
            value: what must be known of it when work goes on, as JSON.
        """
        self.steps[step] = value
        self._noted.append(step)

    def commit(self, files: Iterable[int] = ()) -> None:
        """Make all steps that were noted durable.

        Args:
            files: descriptors of the files that hold their results; these are secured first.
        """
        if not self._noted:
            return
        for descriptor in files:
            os.fsync(descriptor)
        self._append([{"step": step, "value": self.steps[step]} for step in self._noted])
        self._noted.clear()

    def close(self, *, failed: bool = False) -> None:
        """The work ends: the folder goes.

        Args:
            failed: it was stopped; with `resume` what is done is kept.
        """
        self._file.close()
        if not (failed and self._keeps):
            stopping.remove(self.folder)

    def forget_others(self) -> None:
        """Remove what earlier processes that were killed left of this output: it is whole now."""
        for folder, _ in list(_left(self.output)):
            if folder != self.folder:
                with contextlib.suppress(OSError), open(folder / NAME, "r+b") as file:
                    if _lock(file):
                        stopping.remove(folder)

    def _append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
        data = memoryview(text.encode())
        while len(data):
            data = data[self._file.write(data) :]
        os.fsync(self._file.fileno())
        sync_folder(self.folder)

    def _stopped(self) -> tuple[Path, IO[bytes]] | None:
        """The folder of stopped work on this output, its journal open; of several the one that is farthest."""
        best: tuple[int, Path, IO[bytes], dict[str, Any]] | None = None
        other: dict[str, Any] | None = None
        for folder, request in _left(self.output):
            if not (folder / STAGED).exists():  # published already, or nothing was done
                continue
            file = _opened(folder / NAME, "r+b")
            if not _lock(file):
                file.close()
                raise MergeidError(
                    f"{self.output} is being written by another process; wait for it, or choose another name (option "
                    f"-o)"
                )
            if request != self._request:
                other = request
                file.close()
                continue
            lines = _lines(file)
            if best is None or len(lines) > best[0]:
                if best is not None:
                    best[2].close()
                best = len(lines), folder, file, {line["step"]: line["value"] for line in lines[1:]}
            else:
                file.close()
        if best is None:
            if other is not None:
                raise MergeidError(
                    f"--resume: what was interrupted at {self.output} had {_difference(other, self._request)}; "
                    f"repeat its command, or leave out --resume to start over"
                )
            return None
        _, folder, file, self.steps = best
        return folder, file


def _left(output: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Hidden folders of work on this output, and what was asked for there."""
    for folder in sorted(output.parent.glob(_HIDDEN)):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError), open(folder / NAME, "rb") as file:
            head = json.loads(file.readline())
            if head["format"] == FORMAT and head["output"] == output.name:
                yield folder, head["request"]


def _lines(file: IO[bytes]) -> list[dict[str, Any]]:
    """The whole lines of a journal; half a line, where its writer was killed, is cut off."""
    file.seek(0)
    text = file.read()
    whole = text.rfind(b"\n") + 1
    file.truncate(whole)
    file.seek(whole)
    return [json.loads(line) for line in text[:whole].splitlines()]


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    keys = [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)]
    return f"other {keys[0]}" if keys else "another request"


def _opened(path: Path, mode: str) -> IO[bytes]:
    return open(path, mode, buffering=0)


def _lock(file: IO[bytes]) -> bool:
    """Take the lock that a process has on its journal while it lives; whether it was free."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
