"""What every command does around its work: progress on stderr, and stdout for the result alone."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from mergeid.basics.processes import is_first
from mergeid.basics.reading import json_text
from mergeid.errors import plain, visible
from mergeid.io.output import check_files, check_new

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

PLAIN_EVERY = 5.0
"""Seconds between two lines of progress where there is no terminal."""
LONG = 60.0
"""Seconds from which a command says at its end how long it took."""


class Shown(Protocol):
    """A result."""

    def to_json(self) -> object:
        """As plain values."""


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
        self._pace: tuple[str, int, float] = "", 0, 0.0
        self._task: TaskID | None = None
        self._bar: Any = None

    @property
    def console(self) -> Console:
        """For tables and text on stdout: colours on a terminal only."""
        return _console(self.stdout)

    def finish(self, result: Shown, show: Callable[[Any, Console], None]) -> None:
        """The result as JSON where that was asked for, else as people read it."""
        if self.as_json:
            self.emit(result.to_json())
        else:
            self.close()
            show(result, self.console)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Told by long work how far it is: a bar on a terminal, else a line every few seconds."""
        if not is_first() or sys.stderr is None:
            return
        if sys.stderr.isatty():
            self._advance(stage, done, total)
            return
        now = time.monotonic()
        if stage != self._pace[0]:
            self._pace = stage, done, now
        if now - self._last >= PLAIN_EVERY:
            self._last = now
            share, left = (f": {100 * done // total} %", self._left(done, total, now)) if total else ("", None)
            time_left = "" if left is None else f" ({duration(left)} left)"
            with contextlib.suppress(OSError):  # work goes on where nobody can be told how far it is
                print(f"mergeid: {stage}{time_left}{share}", file=sys.stderr, flush=True)

    def _left(self, done: int, total: int, now: float) -> float | None:
        """Seconds until this stage ends, at the pace since it began; None before there is one."""
        _, first, began = self._pace
        return (now - began) * (total - done) / (done - first) if done > first else None

    def _advance(self, stage: str, done: int, total: int) -> None:
        if self._bar is None:
            from rich.progress import (
                BarColumn,
                Progress,
                TaskProgressColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=_console(sys.stderr),
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
        print(visible(text), file=self.stdout, flush=True)

    def note(self, text: str) -> None:
        """A remark, on stderr."""
        self.close()
        with contextlib.suppress(OSError):
            print(f"mergeid: {plain(text)}", file=sys.stderr, flush=True)

    def wrote(self, files: Iterable[os.PathLike[str] | str]) -> None:
        """Where the outputs lie, one per line."""
        for file in files:
            self.say(f"wrote {os.fspath(file)}")


def duration(seconds: float) -> str:
    """``40 s``, ``3 min``, ``2 h 5 min``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _console(file: TextIO) -> Console:
    """Rich's console, which prints names from files without obeying what they may hold."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class Plain(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for part in super().render(renderable, options):
                yield part if part.control else Segment(visible(part.text), part.style)

    return Plain(file=file, highlight=False, soft_wrap=False)


@contextlib.contextmanager
def working(as_json: bool = False) -> Iterator[Work]:
    """Progress while the command works; whatever a library prints on stdout in JSON mode goes to stderr instead."""
    work = Work(sys.stdout, as_json)
    began = time.monotonic()
    aside = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    try:
        with aside:
            yield work
        if (seconds := time.monotonic() - began) >= LONG and is_first():
            work.note(f"took {seconds:.0f} s{_memory()}")
    finally:
        work.close()


def _memory() -> str:
    """The most memory that this process held, where the system tells."""
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f" and {getrusage(RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB of memory at peak"


def to_text(value: Any, indent: int | None = 1) -> str:
    """JSON that every parser reads: numbers that are not finite become null."""
    return json_text(_plain(value), indent)


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


def write_report(path: Path, result: Any, models: Sequence[str]) -> None:
    """The page of ``--report``."""
    from mergeid.reporting.page import report_of, write_page

    write_page(report_of(result, models), path, "--report")


def check_outputs(inputs: Iterable[str | os.PathLike[str] | None], force: bool = False, **outputs: Path | None) -> None:
    """To be called before long work.

    Args:
        inputs: all that the command reads.
        force: whether files that exist already are replaced; what is resumed always is.
        outputs: ``output`` (-o), ``plot``, ``resume``: what it writes besides weights.

    Raises:
        MergeidError: one of them cannot be written, is there already, or is an input or another output.
    """
    if (plot := outputs.get("plot")) is not None:
        from mergeid.reporting.plots import check_plot_path

        check_plot_path(plot)
    named = {"-o" if name == "output" else f"--{name}": path for name, path in outputs.items()}
    check_files(named, inputs)
    if not force:
        check_new({option: path for option, path in named.items() if option != "--resume"})
