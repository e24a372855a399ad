"""Live modules are as they were after a verb has run them, and so is torch's random state.

What a forward pass leaves behind (counters, running averages, a recurrent state, a cache) belongs to its user's passes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


OWN = ("_parameters", "_modules", "_buffers")
"""What a module keeps of its own accord. Parameters are nobody's to write, but for tables that shorten their rows."""
SMALL = 1 << 20
"""Numbers of a tensor that may be a state; larger ones are masks and tables."""


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


@contextmanager
def one_pass(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """A forward pass of which the next one knows nothing: recurrent states, caches and counters are put back after it,
    and the random state, so that models that draw noise draw the same on the same batch.

    Not what is written to buffers of modules in training mode, and of layers with running statistics. Gives a function
    that takes a result out of memory that is put back."""
    import torch
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        modules = list(model.modules())
        remembered = [_remembered(vars(m), m.training or hasattr(m, "running_mean"), largest=SMALL) for m in modules]
        held = [v for m in modules for k, v in vars(m).items() if k not in _usual() and isinstance(v, torch.Tensor)]
        buffers = [b for m in modules for b in m._buffers.values() if b is not None]
        states = {_memory(t) for t in (*held, *buffers)} - {0}
        devices = {p.device for p in model.parameters()} - {torch.device("cpu"), torch.device("meta")}
        indices = [d.index for d in devices if d.type == "cuda" and torch.cuda.is_initialized()]
        noise = torch.random.fork_rng(indices)
        noise.__enter__()
    try:
        yield lambda result: result.clone() if _memory(result) in states else result
    finally:
        with _disable_current_modes():
            noise.__exit__(None, None, None)
            for put_back in remembered:
                put_back()


def _memory(value: Tensor) -> int:
    """Where the memory starts that a tensor is a view of; 0 for what has none."""
    from mergeid.basics.aliases import address_of

    return value.untyped_storage().data_ptr() if address_of(value) else 0


def _remembered(held: dict[str, Any], running: bool = False, *, largest: int | None = None) -> Callable[[], None]:
    """Puts back what a module holds now.

    Args:
        running: its buffers are left as they are.
        largest: numbers of a buffer beyond which its values are not kept.
    """
    import torch

    kept = {k: v for k, v in held.items() if k not in OWN}
    own_things = {k: v for k, v in kept.items() if k not in _usual()}
    inside = [_contents(v) for v in own_things.values()]
    own = {} if running else held.get("_buffers", {})  # a scripted module keeps them elsewhere, under a like name
    buffers = list(own.items())
    tensors = [t for _, t in buffers if largest is None or (t is not None and t.numel() <= largest)]
    tensors += [v for v in own_things.values() if isinstance(v, torch.Tensor) and v.numel() <= SMALL]
    if largest is None and held.get("max_norm") is not None:
        tensors.append(held.get("_parameters", {}).get("weight"))
    values = [(t, t.detach().clone()) for t in tensors if t is not None and not t.is_meta]
    shaped = [(t, t.detach()) for t in _plain_parameters(held)]

    def put_back() -> None:
        for name in [k for k in held if k not in kept and k not in OWN]:
            del held[name]
        held.update(kept)
        for each in inside:
            each()
        if isinstance(own, dict):  # a scripted module keeps them elsewhere
            own.update(buffers)
        for tensor, as_it_was in shaped:
            if (tensor.shape, tensor.stride()) != (as_it_was.shape, as_it_was.stride()):  # t_() and the like
                tensor.data = as_it_was
        for tensor, value in values:
            _refill(tensor, value)

    return put_back


def _plain_parameters(held: dict[str, Any]) -> list[Tensor]:
    """Those that have a shape and strides."""
    import torch

    own = held.get("_parameters")
    found = own.values() if isinstance(own, dict) else ()
    return [t for t in found if type(t) is torch.nn.Parameter and t.layout == torch.strided]


@cache
def _usual() -> frozenset[str]:
    """What every module has."""
    from torch import nn

    return frozenset(vars(nn.Module()))


def _refill(buffer: Tensor, value: Tensor) -> None:
    import torch

    if buffer.shape != value.shape:
        buffer.data = value
    elif buffer.layout != torch.strided or not torch.equal(buffer, value):  # which sparse ones are not asked
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
