"""Where the verbs meet their callers: what the system refuses (files, memory) is a `MergeidError` too."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from mergeid.basics.precision import precision_put_back
from mergeid.basics.untouched import untouched
from mergeid.errors import MergeidError, reason
from mergeid.request import usual

if TYPE_CHECKING:
    from torch import nn

Given = ParamSpec("Given")
Answer = TypeVar("Answer")


def verb(function: Callable[Given, Answer]) -> Callable[Given, Answer]:
    """A verb whose callers get a `MergeidError` for what the system refuses, with the usual options written out in its
    signature where it takes them together."""
    signature = inspect.signature(function)
    together = [p for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    if together:
        own = [p for p in signature.parameters.values() if p not in together]
        signature = signature.replace(parameters=[*own, *usual.parameters()])

    @functools.wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Answer:
        signature.bind(*args, **kwargs)  # an unknown keyword is refused as Python does
        try:
            with (
                precision_put_back(),
                untouched([vars(m) for top in _modules((*args, *kwargs.values())) for m in top.modules()]),
            ):
                return function(*args, **kwargs)
        except MergeidError:
            raise
        except (OSError, MemoryError, RuntimeError) as error:
            sentence = explained(error)
            if sentence is None:
                raise
            raise MergeidError(sentence) from error

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def _modules(given: Iterable[Any]) -> list[nn.Module]:
    """The modules among these values, or in a list, tuple or mapping among them."""
    if "torch" not in sys.modules:  # then there are none
        return []
    from torch import nn

    found = []
    for value in given:
        values = value.values() if isinstance(value, Mapping) else value
        several = isinstance(value, (Mapping, list, tuple))
        found += [v for v in (values if several else [value]) if isinstance(v, nn.Module)]
    return found


def explained(error: BaseException) -> str | None:
    """One sentence for what the system refuses: a file, a connection, memory. None for anything else."""
    if isinstance(error, MemoryError) or _out_of_memory(error):
        return (
            "not enough memory; use smaller models, fewer examples (--limit), smaller batches (--batch-size), "
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
