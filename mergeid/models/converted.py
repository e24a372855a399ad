"""Checkpoints whose library turns some tensors into others on loading: as the network has them, and back as they lie in
the files (experts stacked, a projection split in three)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mergeid.errors import MergeidError
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.derived import Derived, Formed, derived, read_from
from mergeid.io.dtypes import torch_dtype, wider
from mergeid.io.tensors import TensorSource
from mergeid.nn.names import is_asymmetric, plain_table
from mergeid.plugins import Adapter, Conversion, ConvertsWeights, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

Carry = Callable[[str, "Tensor"], "Tensor"]


@dataclass(eq=False, repr=False)
class Converted(Derived):
    """A model with the network's tensors under the network's keys, where these lie otherwise in its files.

    Attributes:
        stored: as it lies.
        conversions: what is turned into what.
    """

    stored: Checkpoint | None = None
    conversions: tuple[Conversion, ...] = ()

    @property
    def first_names(self) -> dict[str, str]:
        """Key -> the first of the tensors in the file that it is made of."""
        return {key: c.names[0] for c in self.conversions for key in c.keys}


class _Group:
    """The tensors that one conversion makes, kept until those of another one are asked for."""

    def __init__(self, stored: Checkpoint) -> None:
        self.stored = stored
        self.kept: tuple[Conversion, Mapping[str, Tensor]] | None = None

    def tensor(self, conversion: Conversion, key: str, dtype: str) -> Tensor:
        if self.kept is None or self.kept[0] is not conversion:
            self.kept = None  # lets go of the others first
            self.kept = conversion, conversion.load(_stored(self.stored, conversion))
        return self.kept[1][key].to(torch_dtype(dtype))


def as_network(checkpoint: Checkpoint, adapter: Adapter, network: nn.Module) -> Checkpoint:
    """The checkpoint with the tensors that its library makes on loading; itself where there are none."""
    if not isinstance(adapter, ConvertsWeights) or is_asymmetric(checkpoint.table):
        return checkpoint
    found = tuple(adapter.conversions(network, plain_table(checkpoint.table)))
    if not found:
        return checkpoint
    own, group, used = network.state_dict(), _Group(checkpoint), {n for c in found for n in c.names}
    formed = {name: read_from(checkpoint, name) for name in checkpoint.table if name not in used}
    for conversion in found:
        dtype = checkpoint.table[conversion.names[0]].dtype
        for name in conversion.names:
            dtype = wider(dtype, checkpoint.table[name].dtype)
        reads = tuple((checkpoint, name) for name in conversion.names)
        for key in conversion.keys:
            info = TensorInfo(dtype, tuple(own[key].shape))
            formed[key] = Formed(info, partial(group.tensor, conversion, key, dtype), reads, f"converted to {key}")
    made = derived(checkpoint.source, checkpoint, formed, parents=[checkpoint])
    values: dict[str, Any] = {f.name: getattr(made, f.name) for f in fields(made)}
    return Converted(**{**values, "stored": checkpoint, "conversions": found})


def places_of(checkpoint: TensorSource, adapter: Adapter, network: nn.Module) -> dict[str, str]:
    """Tensor of a file that is converted on loading -> its place in what it becomes."""
    if not isinstance(adapter, ConvertsWeights):
        return {}
    found = adapter.conversions(network, plain_table(checkpoint.table))
    return {name: f"{c.keys[0]}, part {i}" for c in found for i, name in enumerate(c.names)}


def names_of(checkpoint: Checkpoint, plain: Mapping[str, str]) -> dict[str, str]:
    """Tensor of a checkpoint -> key of the network.

    Args:
        plain: those that are no more than renamed.
    """
    if not isinstance(checkpoint, Converted):
        return dict(plain)
    made = {key: key for conversion in checkpoint.conversions for key in conversion.keys}
    used = {name for conversion in checkpoint.conversions for name in conversion.names}
    return {**{n: k for n, k in plain.items() if n not in used and k not in made}, **made}


def as_stored(checkpoint: Checkpoint, carry: Carry | None = None) -> Checkpoint:
    """The checkpoint with the tensors that lie in its files.

    Args:
        carry: puts tensors, by their names in `checkpoint`, into another order. None: as they lie.
    """
    if not isinstance(checkpoint, Converted) or checkpoint.stored is None:
        return checkpoint
    stored = checkpoint.stored
    if carry is None:
        return stored
    formed = {name: _carried(stored, name, carry) for name in stored.table}
    back = _Back(checkpoint, stored, carry)
    for conversion in checkpoint.conversions:
        reads = tuple((stored, name) for name in conversion.names)
        for name in conversion.names:
            made = partial(back.tensor, conversion, name)
            formed[name] = Formed(stored.table[name], made, reads, "in another order")
    return replace(
        derived(stored.source, stored, formed, parents=[stored]),
        file_of=dict(stored.file_of),
        file_metadata=dict(stored.file_metadata),
        index=stored.index,
        index_metadata=dict(stored.index_metadata),
        parts=stored.parts,
    )


def _carried(stored: Checkpoint, name: str, carry: Carry) -> Formed:
    return Formed(stored.table[name], lambda: carry(name, stored.tensor(name)), ((stored, name),), "in another order")


class _Back:
    """Tensors in another order as files have them, those of one conversion at a time."""

    def __init__(self, checkpoint: Converted, stored: Checkpoint, carry: Carry) -> None:
        self.checkpoint, self.stored, self.carry = checkpoint, stored, carry
        self.kept: tuple[Conversion, Mapping[str, Tensor]] | None = None

    def tensor(self, conversion: Conversion, name: str) -> Tensor:
        if self.kept is None or self.kept[0] is not conversion:
            self.kept = None
            loaded = conversion.load(_stored(self.stored, conversion))
            _check(self.stored, conversion, loaded)
            self.kept = conversion, saved(self.stored, conversion, {k: self.carry(k, t) for k, t in loaded.items()})
        return self.kept[1][name]


def saved(stored: Checkpoint, conversion: Conversion, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's tensors as they lie in files. Raises `MergeidError` where the library knows no way back."""
    try:
        made = conversion.save(tensors)
        return {n: made[n].to(torch_dtype(stored.table[n].dtype)).contiguous() for n in conversion.names}
    except Exception as error:  # of a library, on its way back
        raise _no_way_back(stored, conversion) from error


def _check(stored: Checkpoint, conversion: Conversion, loaded: Mapping[str, Tensor]) -> None:
    """Raises `MergeidError` where what was loaded is not saved as it lay."""
    import torch

    again = saved(stored, conversion, loaded)
    if not all(torch.equal(again[name], stored.tensor(name)) for name in conversion.names):
        raise _no_way_back(stored, conversion)


def _no_way_back(stored: Checkpoint, conversion: Conversion) -> MergeidError:
    return MergeidError(
        f"the library of {stored.source} converts {conversion.names[0]!r} on loading and cannot undo that exactly, so "
        "its neurons cannot be reordered in the file; merge the tensors as is with --match never"
    )


def measured_of(checkpoint: Checkpoint, measured: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured of the network's tensors, for those of the files: of each of their numbers, or of the inputs
    that all tensors of a conversion share.

    Args:
        measured: by names in `checkpoint`.
    """
    import torch

    if not isinstance(checkpoint, Converted) or checkpoint.stored is None:
        return dict(measured)
    found = {name: value for name, value in measured.items() if name not in checkpoint.first_names}
    for c in checkpoint.conversions:
        values = {key: measured[key] for key in c.keys if key in measured}
        if len(values) < len(c.keys):
            continue
        if all(isinstance(v, torch.Tensor) for v in values.values()):
            found |= c.save(values)
        elif len(c.names) == 1 and all(torch.equal(v[0], values[c.keys[0]][0]) for v in values.values()):
            found[c.names[0]] = values[c.keys[0]]
    return found


def overriding(
    checkpoint: Checkpoint, tensors: Mapping[str, Tensor], others: Callable[[set[str]], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Tensors that replace those of the files.

    Args:
        tensors: by their names in `checkpoint`.
        others: gives those of these names that are not replaced, where one of a conversion is.
    """
    if not isinstance(checkpoint, Converted) or checkpoint.stored is None:
        return dict(tensors)
    touched = [c for c in checkpoint.conversions if not tensors.keys().isdisjoint(c.keys)]
    lacking = {key for c in touched for key in c.keys} - tensors.keys()
    every = {**tensors, **(others(lacking) if lacking else {})}
    found = {name: value for name, value in tensors.items() if name not in checkpoint.first_names}
    for conversion in touched:
        found |= saved(checkpoint.stored, conversion, {key: every[key] for key in conversion.keys})
    return found


def _stored(stored: Checkpoint, conversion: Conversion) -> dict[str, Tensor]:
    return {name: stored.tensor(name) for name in conversion.names}
