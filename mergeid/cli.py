"""The command ``mergeid``: one subcommand per file in `mergeid.commands`, one sentence per error.

Exit codes: 0 done, 1 done but the answer is "no", 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from mergeid.commands import adapters, align, barrier, demo, graph, merge, plan, predict, scramble, similarity, sketch
from mergeid.commands import zip as zip_verb
from mergeid.errors import MergeidError, MergeidWarning, WillNotMerge

INTERRUPTED = 130
BROKEN_PIPE = 141

app = typer.Typer(
    name="mergeid",
    help="Will these two models merge, and how?",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _verb in (merge, zip_verb, plan, predict, sketch, align, barrier, similarity, graph, scramble, adapters, demo):
    # Rich keeps the line breaks of a docstring inside its paragraphs; the terminal has its own width.
    _help = "\n\n".join(" ".join(p.split()) for p in (_verb.command.__doc__ or "").split("\n\n"))
    app.command(_verb.__name__.rpartition(".")[2], help=_help)(_verb.command)


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
) -> None:
    """Will these two models merge, and how?

    Finds which neurons of a network may trade places, decides for every layer whether two checkpoints can be averaged
    as they are or must be matched first, merges them, and measures the barrier between them.
    """


def main() -> NoReturn:
    """Entry point of the installed command."""
    sys.exit(run(sys.argv[1:]))


def run(args: Sequence[str]) -> int:
    """Run one command line (without the program's name) and return its exit code.

    Errors meant for the user become one line on stderr. Any other exception is a bug and is passed on."""
    command = typer.main.get_command(app)
    words = list(args) or ["--help"]
    if words[0] == "graph":
        words = ["graph", *graph.spell_out_json(words[1:], command.commands["graph"])]  # type: ignore[attr-defined]
    with _plain_warnings():
        try:
            return command.main(args=words, prog_name="mergeid", standalone_mode=False) or 0
        except WillNotMerge as error:
            return _say(f"{_one_line(error)}", error.exit_code)
        except MergeidError as error:
            return _say(f"error: {_one_line(error)}", error.exit_code)
        except (KeyboardInterrupt, typer.Abort):
            return INTERRUPTED
        except BrokenPipeError:
            # The reader (head, less) is gone; the interpreter would complain again while flushing at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE
        except Exception as error:
            if not _is_usage_error(error):
                raise
            return _say(f"error: {_usage(error)}", error.exit_code)  # type: ignore[attr-defined]


def _is_usage_error(error: Exception) -> bool:
    """Typer brings its own copy of click from some version on, so there is no one class to catch."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def _usage(error: Any) -> str:
    context = getattr(error, "ctx", None)
    text = _one_line(error.format_message()).rstrip(".").replace("Value error, ", "")
    return f"{text}; see {context.command_path} --help" if context is not None else text


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _say(text: str, code: int) -> int:
    print(f"mergeid: {text}", file=sys.stderr)
    return code


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Our own warnings as one line on stderr, each once; those of the libraries below only where Python was asked
    for warnings (-W, PYTHONWARNINGS)."""
    said: set[str] = set()

    def show(message: Any, category: Any, *args: Any, **kwargs: Any) -> None:
        if not issubclass(category, MergeidWarning):
            original(message, category, *args, **kwargs)
        elif (text := _one_line(message)) not in said:
            said.add(text)
            _say(f"warning: {text}", 0)

    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    with warnings.catch_warnings():
        original = warnings.showwarning
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        warnings.simplefilter("always", MergeidWarning)
        warnings.showwarning = show
        yield
