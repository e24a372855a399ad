"""Where the verbs meet their callers: what the system refuses (files, memory) is a `MergeidError` too."""

from __future__ import annotations

import errno
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
from mergeid.request.kinds import Kinds, checked, kinds_of

if TYPE_CHECKING:
    from torch import nn

Given = ParamSpec("Given")
Answer = TypeVar("Answer")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a disk without room says; files that mergeid writes by name are named before that gets here."""


def verb(function: Callable[Given, Answer]) -> Callable[Given, Answer]:
    """A verb whose callers get a `MergeidError` for what the system refuses and for arguments of another kind than its
    signature says, with the usual options written out in that signature where it takes them together."""
    signature = inspect.signature(function)
    together = [p for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    if together:
        own = [p for p in signature.parameters.values() if p not in together]
        signature = signature.replace(parameters=[*own, *usual.parameters()])

    kinds: Kinds = {}

    @functools.wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Answer:
        bound = signature.bind(*args, **kwargs)  # an unknown keyword is refused as Python does
        if not kinds:  # the module is whole only now
            kinds.update(kinds_of(signature, (usual.__name__, function.__module__)))
        bound.arguments.update(checked(bound.arguments, kinds))
        try:
            with (
                precision_put_back(),
                untouched([vars(m) for top in _modules((*args, *kwargs.values())) for m in top.modules()]),
            ):
                return function(*bound.args, **bound.kwargs)
        except MergeidError:
            raise
        except (OSError, MemoryError, RuntimeError, ImportError) as error:
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
        if not names and error.errno in _FULL:
            return f"cannot write to stdout or a temporary file: {reason(error)}; make room on the disk"
        where = f"cannot use {' or '.join(names)}: " if names else "the system refuses: "
        return f"{where}{reason(error)}; check the path, its permissions and the space on the disk"
    return None


def _out_of_memory(error: BaseException) -> bool:
    """torch has a class of its own for GPUs, and none for the CPU."""
    if type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    if isinstance(error, ImportError):  # of a shared library
        return "failed to map segment" in text or "cannot allocate memory" in text
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)
