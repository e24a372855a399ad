"""All commands in one application: one subcommand per file beside this one, one sentence per error."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperCommand, TyperGroup

from mergeid.basics.processes import is_first, speaks
from mergeid.commands import (
    adapters,
    align,
    barrier,
    demo,
    explain,
    extract,
    graph,
    merge,
    moe,
    plan,
    predict,
    rank,
    report,
    scramble,
    similarity,
    sketch,
    soup,
)
from mergeid.commands import zip as zip_verb
from mergeid.commands.launch import SHARED
from mergeid.commands.of_mergekit import advised
from mergeid.errors import MergeidError, MergeidWarning, WillNotMerge, cut, plain, reason, shown

FAULT = 3
INTERRUPTED = 130
BROKEN_PIPE = 141
TRACEBACK = "--traceback"
PLACES = ("MODEL", "BASE", "A", "DATA", "OUT", "FILE", "[FILE]", "FOLDER")
"""What the values of options stand for that name files or models."""


def _untyped(found: list[Any]) -> list[Any]:
    """Parameters whose help names no Python type: a switch has no value, and what an argument is its own help says."""
    for p in found:
        if p.param_type_name == "argument" or getattr(p, "is_flag", False):
            p.display_type_rich = lambda ctx: None
    return found


class _Verb(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        return _untyped(super().get_params(ctx))


class _Verbs(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        return _untyped(super().get_params(ctx))


app = typer.Typer(
    name="mergeid",
    cls=_Verbs,
    help="Will these two models merge, and how?",
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_VERBS = (
    *(merge, soup, zip_verb, plan, predict, rank, report, barrier, align, sketch),
    *(similarity, graph, scramble, extract, moe, explain, adapters, demo),
)
for _verb in _VERBS:
    # Rich keeps the line breaks of a docstring inside its paragraphs; the terminal has its own width.
    _help = "\n\n".join(" ".join(p.split()) for p in (_verb.command.__doc__ or "").split("\n\n"))
    app.command(_verb.__name__.rpartition(".")[2], cls=_Verb, help=_help)(_verb.command)


def _version(wanted: bool) -> None:
    if wanted:
        import mergeid

        print(f"mergeid {mergeid.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    show_traceback: Annotated[
        bool, typer.Option(TRACEBACK, help="Show the traceback of an internal error (exit code 3).")
    ] = False,
) -> None:
    """Will these two models merge, and how?

    Finds which neurons of a network may trade places, decides for every layer whether two checkpoints can be averaged
    as they are or must be matched first, merges them, and measures the barrier between them.
    """


def answer(args: Sequence[str]) -> int:
    """Run one command line and return its exit code; whatever goes wrong becomes one line on stderr."""
    words, traced = _without_traceback(args)
    if words and words[0] not in SHARED and not is_first():
        return 0
    with _plain_warnings():
        try:
            _check_working_directory()
            return _call(words or ["--help"])
        except Exception as error:
            code = _failed(error, traced)
            return code if speaks() else 0  # the first process says it, and must not be stopped before
        except KeyboardInterrupt:
            return INTERRUPTED


def finish(code: int) -> int:
    """Write out what is still buffered for stdout, and the exit code that this leaves."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        _drop_stdout()
        if not isinstance(error, BrokenPipeError):
            return _say(f"error: cannot write the result to stdout: {reason(error)}", MergeidError.exit_code)
        return BROKEN_PIPE
    return code


def _without_traceback(args: Sequence[str]) -> tuple[list[str], bool]:
    """``--traceback`` may stand anywhere before a ``--``."""
    words = list(args)
    end = words.index("--") if "--" in words else len(words)
    return [w for i, w in enumerate(words) if w != TRACEBACK or i > end], TRACEBACK in words[:end]


def _call(words: list[str]) -> int:
    _tolerate_any_text()
    command = typer.main.get_command(app)
    if words[0] == "graph":
        words = ["graph", *graph.spell_out_json(words[1:], command.commands["graph"])]  # type: ignore[attr-defined]
    if words[0] in command.commands:  # type: ignore[attr-defined]
        _check_named(words, command.commands[words[0]].params)  # type: ignore[attr-defined]
    return command.main(args=words, prog_name="mergeid", standalone_mode=False) or 0


def _check_named(words: Sequence[str], params: Sequence[Any]) -> None:
    """Raises `MergeidError` for a file or model without a name (a variable that is not set), which the parser takes for
    the working directory."""
    kinds = {o: p.metavar for p in params for o in p.opts if o.startswith("-") and not getattr(p, "is_flag", False)}
    for before, word in pairwise(words):
        option = before if word == "" else word[:-1]
        if word == "" and (before == "--" or option not in kinds) and words[0] not in ("explain", "adapters"):
            raise MergeidError(
                f"an argument of mergeid {words[0]} is empty; expected the name of a file, folder or model"
            )
        if (word == "" or word.endswith("=")) and kinds.get(option) in PLACES:
            raise MergeidError(f"{option} is empty; expected the name of a file, folder or model")


def _check_working_directory() -> None:
    """Raises `MergeidError` where it has been removed, which libraries below do not survive."""
    try:
        os.getcwd()
    except OSError as error:
        raise MergeidError(f"the working directory cannot be used: {reason(error)}; change to another one") from None


def _failed(error: Exception, traced: bool) -> int:
    """Say what happened, in one line, and return the exit code that belongs to it."""
    if isinstance(error, WillNotMerge):
        return _say(str(error), error.exit_code)
    if isinstance(error, MergeidError):
        return _say(f"error: {error}", error.exit_code)
    if isinstance(error, typer.Abort):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        _drop_stdout()  # the reader (head, less) is gone; the interpreter would complain again while flushing at exit
        return BROKEN_PIPE
    if isinstance(error, OSError):
        _drop_unwritable_stdout()
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        # Typer brings its own copy of click from some version on, so there is no one class to catch.
        return _say(f"error: {_usage(error)}", error.exit_code)
    from mergeid.request.boundary import explained

    if (sentence := explained(error)) is not None:
        return _say(f"error: {sentence}", MergeidError.exit_code)
    if traced:
        traceback.print_exception(error)
    return _say(f"error: {_fault(error)}", FAULT)


def _fault(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if any(p.startswith("mergeid") for p in Path(f.filename).parts[:-1])] or frames
    place = f" in {'/'.join(Path(own[-1].filename).parts[-2:])}, line {own[-1].lineno}" if own else ""
    return (
        f"internal error{place} ({type(error).__name__}: {cut(reason(error), 200)}); this is a bug in mergeid: "
        f"please report it with the output of {TRACEBACK} shows"
    )


def _usage(error: Any) -> str:
    context = getattr(error, "ctx", None)
    if (told := _expected(error)) is not None:
        return f"{told}; see {context.command_path} --help" if context is not None else told
    text = advised(_suggested(plain(error.format_message()).rstrip(".").replace("Value error, ", "")))
    see = "" if context is None else f"{' See' if text.endswith('?') else '; see'} {context.command_path} --help"
    return text + see


def _expected(error: Any) -> str | None:
    """What a value that does not parse is, and what was expected, where Typer leaves both to pydantic."""
    asked = getattr(error.__cause__, "errors", None)
    found = asked()[0] if callable(asked) else {}
    limits = found.get("ctx", {})
    expected = {
        "int_parsing": "a whole number",
        "int_parsing_size": "a whole number of fewer digits",
        "float_parsing": "a number",
        "greater_than_equal": f"at least {limits.get('ge')}",
        "less_than_equal": f"at most {limits.get('le')}",
        "string_unicode": "text in UTF-8",
    }.get(found.get("type", ""))
    name = next(iter(getattr(getattr(error, "param", None), "opts", ())), None)
    return None if expected is None or name is None else f"{name} is {shown(found['input'])}; expected {expected}"


def _suggested(text: str) -> str:
    """With the names that a mistyped one may have meant, in one form for options and values."""
    text = re.sub(r"\. Did you mean (.+)\?$", lambda m: f"; did you mean {m[1].replace(', ', ' or ')}?", text)
    text = re.sub(r" \(Possible options: (.+)\)$", lambda m: f"; did you mean {m[1].replace(', ', ' or ')}?", text)
    if found := re.search(r"'([^']*)' is not one of (('[^']*'(, )?)+)", text):
        near = difflib.get_close_matches(found[1], re.findall(r"'([^']*)'", found[2]), n=1)
        text += f"; did you mean {near[0]}?" if near else ""
    return text


def _say(text: str, code: int) -> int:
    if sys.stderr is not None and speaks():
        with contextlib.suppress(OSError):
            print(f"mergeid: {plain(text)}", file=sys.stderr, flush=True)
    return code


def _drop_unwritable_stdout() -> None:
    """What is still buffered is tried once more now, so that the interpreter does not complain of it at its end."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _drop_stdout()


def _drop_stdout() -> None:
    """What is still to be written to stdout goes nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tolerate_any_text() -> None:
    """Names that the terminal's encoding lacks are printed as escapes, never as an error."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Our own warnings as one line on stderr, each once; those of the libraries below only where Python was asked
    for warnings (-W, PYTHONWARNINGS)."""
    said: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not issubclass(category, MergeidWarning):
            original(message, category, filename, lineno, file, line)
        elif (text := plain(message)) not in said:
            said.add(text)
            _say(f"warning: {text}", 0)

    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with warnings.catch_warnings():
        original = warnings.showwarning
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        warnings.simplefilter("always", MergeidWarning)
        warnings.showwarning = show
        yield
