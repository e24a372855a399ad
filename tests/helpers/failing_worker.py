"""Run by `accelerate launch` in test_processes.py: a command of which one process fails where answers are collected."""

from __future__ import annotations

import os
import sys
from typing import Any

from mergeid.basics import processes
from mergeid.commands.app import finish
from mergeid.commands.cli import run
from mergeid.errors import MergeidError

how, which = sys.argv[1], sys.argv[2]
collected = processes.collected


def failing(*args: Any) -> Any:
    if os.environ["RANK"] == which:
        if how == "dies":
            os._exit(9)
        raise MergeidError("the disk of this process is full") if how == "refuses" else ValueError("a fault")
    return collected(*args)


processes.collected = failing
sys.exit(finish(run(sys.argv[3:])))
