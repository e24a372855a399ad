"""Live modules are as they were after a verb has run them, and so is torch's random state.

What a forward pass leaves behind (counters, running averages, a recurrent state, a cache) belongs to its user's passes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


OWN = ("_parameters", "_modules", "_buffers")
"""What a module keeps of its own accord. Parameters are nobody's to write."""


@contextmanager
def untouched(holders: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Put back flags, attributes and buffers, and torch's random state on the CPU.

    Args:
        holders: the ``__dict__`` of every module.
    """
    if "torch" not in sys.modules:  # then there are none
        yield
        return
    import torch

    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([]))
        for held in holders:
            stack.callback(_remembered(held))
        yield


def _remembered(held: dict[str, Any]) -> Callable[[], None]:
    """Puts back what a module holds now."""
    kept = {k: v for k, v in held.items() if k not in OWN}
    inside = [_contents(v) for k, v in kept.items() if not k.startswith("_")]
    own = held.get("_buffers", {})  # a scripted module keeps them elsewhere
    buffers = [(name, t, t if t is None or t.is_meta else t.clone()) for name, t in own.items()]

    def put_back() -> None:
        for name in [k for k in held if k not in kept and k not in OWN]:
            del held[name]
        held.update(kept)
        for each in inside:
            each()
        for name, buffer, value in buffers:
            own[name] = buffer
            _refill(buffer, value)

    return put_back


def _refill(buffer: Tensor | None, value: Tensor | None) -> None:
    import torch

    if buffer is None or value is None or buffer.is_meta:
        return
    if buffer.shape != value.shape:
        buffer.data = value
    elif not torch.equal(buffer, value):
        with torch.no_grad():
            buffer.copy_(value)


def _contents(value: Any) -> Callable[[], None]:
    """Puts back what a list or dict holds."""
    if type(value) is list:
        return partial(value.__setitem__, slice(None), list(value))
    if type(value) is dict:
        kept = dict(value)

        def put_back() -> None:
            value.clear()
            value.update(kept)

        return put_back
    return lambda: None
