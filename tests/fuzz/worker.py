"""A process that has mergeid imported and runs one command line after the other, as `mergeid` itself would.

Reads one job a line on stdin and answers one line on what was stdout; both streams of the command go to files.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import resource
import sys
import traceback


def main() -> None:
    jobs = os.fdopen(os.dup(0), "r", encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    import numpy  # noqa: F401
    import torch
    import typer.main

    import mergeid.commands.cli  # noqa: F401

    torch.set_num_threads(1)
    # The commands' options are read from signatures every time, which is most of what a small input takes.
    typer.main.get_command = functools.cache(typer.main.get_command)
    _limit(int(sys.argv[1]))
    answers.write("ready\n")
    answers.flush()
    path = list(sys.path)
    environment = dict(os.environ)
    for count, line in enumerate(jobs):
        job = json.loads(line)
        os.chdir(job["folder"])
        os.environ.update(job["env"])
        streams = [os.open(job[k], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600) for k in ("out", "err")]
        os.dup2(streams[0], 1)
        os.dup2(streams[1], 2)
        sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        code = run(job["words"])
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        answers.write(json.dumps({"code": code}) + "\n")
        answers.flush()
        for stream in streams:
            os.close(stream)
        os.dup2(quiet, 1)
        sys.path[:] = path
        os.environ.clear()
        os.environ.update(environment)
        if count % 100 == 99:
            gc.collect()


def run(words: list[str]) -> int:
    """Exit code of one command line."""
    from mergeid.commands import cli

    sys.argv = ["mergeid", *words]
    try:
        cli.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _limit(gigabytes: int) -> None:
    """Memory that an input may take beside what the libraries do: a bomb shall fail, not the machine."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + gigabytes * 2**30,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**30,) * 2)


if __name__ == "__main__":
    main()
