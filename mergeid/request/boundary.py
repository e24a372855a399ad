"""Where the verbs meet their callers: what is wrong with an argument, the disk or the memory is a `MergeidError`."""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable
from typing import Any, TypeVar

from mergeid.errors import MergeidError, reason, shown

Verb = TypeVar("Verb", bound=Callable[..., Any])

LARGEST_SEED = 2**63 - 1
_LEAST = {"limit": 1, "calibration_limit": 1, "batch_size": 1}
"""Arguments that count something, and the least that makes sense."""


def verb(function: Verb) -> Verb:
    """A verb whose callers get a `MergeidError` for bad numbers, and for what the system refuses (files, memory)."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        check_seed(kwargs.get("seed", 0))
        if str(kwargs.get("device", "")).partition(":")[0] == "meta":
            raise MergeidError("device 'meta' holds no values; expected cpu, cuda, cuda:1, mps, … (option --device)")
        for name, least in _LEAST.items():
            if kwargs.get(name) is not None:
                _check_count(name, kwargs[name], least)
        try:
            return function(*args, **kwargs)
        except MergeidError:
            raise
        except (OSError, MemoryError, RuntimeError) as error:
            sentence = explained(error)
            if sentence is None:
                raise
            raise MergeidError(sentence) from error

    return call  # type: ignore[return-value]


def check_seed(seed: object) -> int:
    """Raises `MergeidError` for a seed that is no whole number from 0 to 2^63 - 1."""
    number = _whole(seed)
    if number is None or not 0 <= number <= LARGEST_SEED:
        raise MergeidError(f"seed is {shown(seed)}; expected a whole number from 0 to 2^63 - 1 (option --seed)")
    return number


def _check_count(name: str, value: object, least: int) -> None:
    number = _whole(value)
    if number is None or number < least:
        raise MergeidError(
            f"{name} is {shown(value)}; expected a whole number of at least {least} (option --{name.replace('_', '-')})"
        )


def _whole(value: object) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def explained(error: BaseException) -> str | None:
    """One sentence for what the system refuses: a file, a connection, memory. None for anything else."""
    if isinstance(error, MemoryError) or _out_of_memory(error):
        return (
            "not enough memory for this; use smaller models, fewer examples (--limit), smaller batches (--batch-size), "
            "or a machine with more"
        )
    if isinstance(error, OSError):
        names = [os.fsdecode(f) for f in (error.filename, error.filename2) if isinstance(f, (str, bytes))]
        where = f"cannot use {' or '.join(names)}: " if names else "the system refuses: "
        return f"{where}{reason(error)}; check the path, its permissions and the space on the disk"
    return None


def _out_of_memory(error: BaseException) -> bool:
    """torch has a class of its own for GPUs, and none for the CPU."""
    if type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)
