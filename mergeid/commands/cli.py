"""The command ``mergeid``. Signals are taken care of before anything else is imported.

Exit codes: 0 done, 1 done but the answer is "no", 2 bad input, 3 a fault of mergeid itself (`--traceback` shows it),
130 interrupted, 143 terminated, 129 hung up.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from mergeid.basics import stopping


def main() -> NoReturn:
    """Entry point of the installed command."""
    stopping.install()
    _open_streams()
    gc.set_threshold(50_000)  # what is imported stays, and to look through it again and again takes a quarter second
    from mergeid.commands.app import finish

    sys.exit(finish(run(sys.argv[1:])))


def _open_streams() -> None:
    """Where a standard stream is closed (``2>&-``), the next file that is opened would get its number, and what
    libraries print there would end up in that file: an output may be such a file."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            while os.open(os.devnull, os.O_RDWR) < number:
                pass  # a lower number is closed too
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def run(args: Sequence[str]) -> int:
    """Run one command line (without the program's name) and return its exit code.

    Whatever goes wrong becomes one line on stderr; ``--traceback`` among the words shows where a fault of mergeid
    itself came from."""
    from mergeid.commands.app import answer

    return answer(args)
