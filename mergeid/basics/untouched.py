"""Live modules are as they were after a verb has run them, and so is torch's random state.

What a forward pass leaves behind (counters, running averages, a recurrent state, a cache) belongs to its user's passes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def untouched(given: Iterable[Any]) -> Iterator[None]:
    """Put back training flags, attributes and buffers of modules among these values, or in a list, tuple or mapping
    among them, and torch's random state on the CPU. Parameters are nobody's to write."""
    if "torch" not in sys.modules:  # then there are none
        yield
        return
    import torch

    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([]))
        for top in _modules(given):
            for module in top.modules():
                stack.callback(_remembered(module))
        yield


def _modules(given: Iterable[Any]) -> list[nn.Module]:
    from torch import nn

    found = []
    for value in given:
        values = value.values() if isinstance(value, Mapping) else value
        several = isinstance(value, (Mapping, list, tuple))
        found += [v for v in (values if several else [value]) if isinstance(v, nn.Module)]
    return found


def _remembered(module: nn.Module) -> Callable[[], None]:
    """Puts back what the module holds now, but for its parameters and layers."""
    held = vars(module)
    kept = {k: v for k, v in held.items() if k not in ("_parameters", "_modules", "_buffers")}
    inside = [_contents(v) for k, v in kept.items() if not k.startswith("_")]
    buffers = [(name, t, t if t is None or t.is_meta else t.clone()) for name, t in module._buffers.items()]

    def put_back() -> None:
        for name in [k for k in held if k not in kept and k not in ("_parameters", "_modules", "_buffers")]:
            del held[name]
        held.update(kept)
        for each in inside:
            each()
        for name, buffer, value in buffers:
            _put_back(module, name, buffer, value)

    return put_back


def _put_back(module: nn.Module, name: str, buffer: Tensor | None, value: Tensor | None) -> None:
    import torch

    module._buffers[name] = buffer
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
