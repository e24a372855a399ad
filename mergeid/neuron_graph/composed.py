"""Operators as the plainer calls that they stand for: those that take functions as arguments, such as flex attention,
and those that torch itself writes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._C import DispatchKey, _dispatch_has_kernel_for_dispatch_key
from torch._ops import HigherOrderOperator, OpOverload

__all__ = ["HigherOrderOperator", "plain_calls"]


def plain_calls(operator: HigherOrderOperator | OpOverload) -> Callable[..., Any] | None:
    """The operator written out in calls that a dispatch mode sees; None where torch has none."""
    if isinstance(operator, HigherOrderOperator):
        return operator.py_kernels.get(DispatchKey.CompositeExplicitAutograd)
    written_out = _dispatch_has_kernel_for_dispatch_key(operator.name(), DispatchKey.CompositeImplicitAutograd)
    return operator.decompose if written_out else None
