"""Commands under ``accelerate launch``: the processes share the work, and the first one writes and prints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mergeid.basics import processes
from mergeid.commands.terminal import Call
from mergeid.errors import MergeidError

SHARED = frozenset({"plan", "merge", "barrier"})
"""Commands whose work is shared out; of any other, the first process does all."""

LEFT = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""What gloo says where the process that it talks to has gone."""


@contextmanager
def together(call: Call[Any]) -> Iterator[None]:
    """What is called inside is shared out among the processes that were launched, if there are several. They end
    together; where one of them fails, it says why, and all end.

    Raises `MergeidError` for a device that is not there, and where another process has ended without saying why."""
    if processes.launched() == 1:
        yield
        return
    from accelerate import PartialState

    from mergeid.models.running import make_accelerator
    from mergeid.request.request import Run

    make_accelerator(Run(device=call.device).device)
    try:
        with processes.together():
            yield
        PartialState().wait_for_everyone()  # a process that ends while another still talks to it makes that one abort
    except BaseException as error:
        if processes.fell() and any(sign in str(error) for sign in LEFT):
            raise MergeidError(
                "another process has ended without saying why, perhaps because memory ran out; start again with fewer "
                "processes, or look at the system's log"
            ) from error
        raise
    PartialState().destroy_process_group()
