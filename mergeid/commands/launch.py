"""Commands under ``accelerate launch``: the processes share the work, and the first one writes and prints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mergeid.basics import processes
from mergeid.commands.terminal import Call

SHARED = frozenset({"plan", "merge", "barrier"})
"""Commands whose work is shared out; of any other, the first process does all."""


@contextmanager
def together(call: Call[Any]) -> Iterator[None]:
    """What is called inside is shared out among the processes that were launched, if there are several.

    Raises `MergeidError` for a device that is not there."""
    if processes.launched() == 1:
        yield
        return
    from accelerate import PartialState

    from mergeid.models.running import make_accelerator
    from mergeid.request.request import Run

    make_accelerator(Run(device=call.device).device)
    with processes.together():
        yield
    PartialState().destroy_process_group()
