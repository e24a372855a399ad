"""Which tensor of a checkpoint is which of the network that its config describes, before anything is loaded."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from mergeid.errors import MergeidError
from mergeid.io.building import Room, build, within
from mergeid.io.tensors import TensorSource
from mergeid.plugins import Adapter, StacksExperts, adapter_names, get_adapter


@dataclass(frozen=True)
class Network:
    """A network by its names.

    Attributes:
        adapter: the one that knows it.
        keys: name in the files -> key of the network's state dict.
        tied: key -> the other keys of the same parameter.
        stacked: keys that the library puts together of several tensors of the files.
        shapes: key -> shape.
    """

    adapter: Adapter
    keys: dict[str, str]
    tied: dict[str, frozenset[str]]
    stacked: frozenset[str]
    shapes: dict[str, tuple[int, ...]]

    def name_of(self, key: str) -> str | None:
        """The name in the files of a key."""
        return next((name for name, own in self.keys.items() if own == key), None)

    def key_of(self, name: str) -> str | None:
        """The key that is named so, whatever stands before it in either."""
        every = {*self.keys.values(), *self.tied, *self.stacked}
        if name in every:
            return name
        ends = [key for key in every if key.endswith(f".{name}") or name.endswith(f".{key}")]
        return ends[0] if len(ends) == 1 else None


def network_of(checkpoint: TensorSource) -> Network | None:
    """The network of a checkpoint, built without memory; None where no library knows it, or several do."""
    from mergeid.basics.aliases import tied_groups

    room = Room.of(checkpoint.table)
    found = []
    for name in adapter_names():
        adapter = get_adapter(name)
        with suppress(MergeidError), within(room, checkpoint.source):
            arch = adapter.recognise(checkpoint.table, checkpoint.config, checkpoint.metadata)
            if arch is not None:
                found.append((adapter, arch, build(adapter, arch, room, device="meta")))
    if len(found) != 1:
        return None
    adapter, arch, model = found[0]
    tied = {key: frozenset(group) - {key} for group in tied_groups(model) for key in group if len(group) > 1}
    stacked = adapter.stacked(model, checkpoint.table) if isinstance(adapter, StacksExperts) else {}
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    return Network(adapter, adapter.tensor_names(arch, model, checkpoint.table), tied, frozenset(stacked), shapes)
