"""What every command does around its work: progress on stderr, and stdout for the result alone."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mergeid.commands.options import WEIGHTS
from mergeid.errors import MergeidError
from mergeid.io.output import check_place

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

PLAIN_EVERY = 5.0
"""Seconds between two lines of progress where there is no terminal."""


class Work:
    """Handed to a command while it works.

    Attributes:
        stdout: where the result goes, and nothing else.
    """

    def __init__(self, stdout: TextIO, as_json: bool) -> None:
        self.stdout = stdout
        self.as_json = as_json
        self._stage = ""
        self._last = time.monotonic()
        self._task: TaskID | None = None
        self._bar: Any = None

    @property
    def console(self) -> Console:
        """For tables and text on stdout: colours on a terminal only."""
        from rich.console import Console

        return Console(file=self.stdout, highlight=False, soft_wrap=False)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Told by long work how far it is: a bar on a terminal, else a line every few seconds."""
        if sys.stderr.isatty():
            self._advance(stage, done, total)
            return
        now = time.monotonic()
        if now - self._last >= PLAIN_EVERY:
            self._last = now
            share = f": {100 * done // total} %" if total else ""
            print(f"mergeid: {stage}{share}", file=sys.stderr, flush=True)

    def _advance(self, stage: str, done: int, total: int) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
        if stage != self._stage:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._stage, self._task = stage, self._bar.add_task(stage, total=total or None)
        self._bar.update(self._task, completed=done, total=total or None)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def emit(self, value: Any, indent: int | None = 1) -> None:
        """The result as JSON on stdout."""
        self.close()
        print(to_text(value, indent), file=self.stdout, flush=True)

    def say(self, text: str) -> None:
        """Text of the result, on stdout."""
        self.close()
        print(text, file=self.stdout, flush=True)

    def note(self, text: str) -> None:
        """A remark, on stderr."""
        self.close()
        print(f"mergeid: {text}", file=sys.stderr, flush=True)

    def wrote(self, files: Iterable[os.PathLike[str] | str]) -> None:
        """Where the outputs lie, one per line."""
        for file in files:
            self.say(f"wrote {os.fspath(file)}")


@contextlib.contextmanager
def working(as_json: bool = False) -> Iterator[Work]:
    """Progress while the command works; whatever a library prints on stdout in JSON mode goes to stderr instead."""
    work = Work(sys.stdout, as_json)
    aside = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    try:
        with aside:
            yield work
    finally:
        work.close()


def to_text(value: Any, indent: int | None = 1) -> str:
    """JSON that every parser reads: numbers that are not finite become null."""
    return json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def check_text_output(path: Path, option: str, inputs: Iterable[str] = ()) -> None:
    """To be called before long work.

    Raises:
        MergeidError: the place cannot be written, or holds weights."""
    if path.suffix in WEIGHTS:
        raise MergeidError(f"{option} {path} would be a file of weights; expected a name such as {path.stem}.json")
    if any(os.path.realpath(path) == os.path.realpath(given) for given in inputs):
        raise MergeidError(f"{option} {path} is an input; choose another name")
    check_place(path, option)


def write_text(path: Path, text: str, option: str) -> None:
    """Write a small result file whole or not at all (straight into a pipe or device).

    Raises:
        MergeidError: the place cannot be written.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise MergeidError(
            f"{option} {path} cannot be written: {(error.strerror or str(error)).lower()}; choose another place"
        ) from None
