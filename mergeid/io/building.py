"""Models built by an adapter from what a config says, within bounds: a config is input, and may say anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from mergeid.errors import MergeidError, reason
from mergeid.plugins import Adapter, Architecture, TensorTable

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Room:
    """How large a model may become.

    Attributes:
        tensors, elements: most parameters and buffers, and most numbers in them.
        longest: longest dimension.
        why: what stands against more.
    """

    tensors: int
    elements: int
    longest: int
    why: str

    @classmethod
    def of(cls, table: TensorTable) -> Room:
        """Some times what a checkpoint holds (it may lack a head, or name tied weights once)."""
        total = sum(prod(info.shape) for info in table.values())
        why = f"the checkpoint holds {len(table):,} tensors with {total:,} numbers"
        return cls(8 * len(table) + 10_000, 8 * total + 50_000_000, 2**63, why)


BARE = Room(100_000, 10**13, 2**25, "a network of that size cannot be traced")
"""Where there is no checkpoint."""


@contextmanager
def naming(source: str) -> Iterator[None]:
    """While open, what an adapter says against a model, whose files it never sees, begins with the model's name.

    Raises:
        MergeidError: of the same class.
    """
    try:
        yield
    except MergeidError as error:
        text = str(error)
        if text.startswith(f"{source} ") or f"{source}/" in text or f"{source}:" in text:
            raise
        raise type(error)(f"{source}: {text}") from error


@contextmanager
def within(room: Room, what: str) -> Iterator[None]:
    """While open, a model that outgrows `room` is stopped, and whatever a library says against its config is one
    sentence: what is built here is what a file says.

    Raises:
        MergeidError: both.
    """
    from torch.nn.modules import module

    grown = [0, 0]

    def grow(owner: nn.Module, name: str, value: Any) -> None:
        if value is None:
            return
        grown[0] += 1
        grown[1] += value.numel()
        if grown[0] > room.tensors or grown[1] > room.elements or max(value.shape, default=0) > room.longest:
            size = f"{grown[0]:,} tensors with {grown[1]:,} numbers, and more"
            raise MergeidError(f"{what} would have {size}, but {room.why}; expected the config of this model")

    hooks = [
        module.register_module_parameter_registration_hook(grow),
        module.register_module_buffer_registration_hook(grow),
    ]
    try:
        yield
    except MergeidError:
        raise
    except Exception as error:  # each library has its own ways to refuse a config
        raise MergeidError(
            f"{what} cannot be built as its config says ({type(error).__name__}: {reason(error)}); check the config, "
            "and that it belongs to the installed version of the library"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _without_values() -> Iterator[None]:
    """While open, parameters get a shape and no values; buffers, which code computes, are as ever."""
    from torch import nn
    from torch.nn.modules import module

    def emptied(owner: nn.Module, name: str, value: Any) -> Any:
        if value is None or value.is_meta:
            return None  # the same object stays tied
        return nn.Parameter(value.to("meta"), requires_grad=value.requires_grad)

    hook = module.register_module_parameter_registration_hook(emptied)
    try:
        yield
    finally:
        hook.remove()


def skeleton(adapter: Adapter, arch: Architecture, room: Room) -> nn.Module | None:
    """The adapter's model on the CPU, its parameters on the meta device; None where its code needs their values.

    Raises `MergeidError` where it would be larger than there is room for."""
    from torch import nn

    plain = nn.Module._load_from_state_dict, nn.modules.batchnorm._NormBase._load_from_state_dict
    with within(room, arch.id):
        adapter.build(arch, device="meta")
    try:
        with _without_values():
            model = adapter.build(arch)
    except Exception:  # each library has its own ways to say so
        return None
    own = all(type(m)._load_from_state_dict in plain and not m._load_state_dict_pre_hooks for m in model.modules())
    bare = all(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())
    return model if own and bare else None


def build(adapter: Adapter, arch: Architecture, room: Room, *, device: str | torch.device = "cpu") -> nn.Module:
    """The adapter's model, built on the meta device first where a file says what it is.

    Raises:
        MergeidError: it would be larger than there is room for, or the library refuses what the config says.
    """
    if arch.options.get("config") is not None and str(device) != "meta":
        with within(room, arch.id):
            adapter.build(arch, device="meta")
    with within(room, arch.id):
        return adapter.build(arch, device=device)
