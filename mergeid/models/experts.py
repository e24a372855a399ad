"""Experts that lie in one tensor in one file and one by one in another, as versions of a library write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergeid.io.checkpoint import Checkpoint
from mergeid.io.derived import Formed, derived, read_from
from mergeid.io.tensors import TensorSource
from mergeid.nn.names import plain_table
from mergeid.plugins import Adapter, Architecture, StacksExperts, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor, nn


def as_in_first(
    first: TensorSource, other: Checkpoint, adapter: Adapter, arch: Architecture, network: nn.Module
) -> tuple[Checkpoint, str]:
    """The other model with its experts in tensors as the first one has them, and a note on it; itself and no note where
    there is nothing to do.

    Args:
        network: the first model's, on the meta device.
    """
    if not isinstance(adapter, StacksExperts):
        return other, ""
    ours, theirs = adapter.stacked(network, first.table), adapter.stacked(network, other.table)
    if bool(ours) == bool(theirs):
        return other, ""
    fused = other if ours else first
    names = adapter.tensor_names(arch, network, plain_table(fused.table))
    name_of = {key: name for name, key in names.items()}
    formed: dict[str, Formed] = {}
    used: set[str] = set()
    for key, kinds in (ours or theirs).items():
        whole = name_of.get(key)
        if whole is None:
            return other, ""
        if ours:
            formed |= _apart(other, whole, kinds)
            used.add(whole)
        else:
            formed[whole] = _together(other, kinds)
            used |= {name for experts in kinds for name in experts}
    rest = {name: read_from(other, name) for name in other.table if name not in used}
    how = "one by one" if ours else "in one tensor"
    note = f"the experts of {other.source} are read {how}, as {first.source} has them"
    return derived(other.source, other, {**rest, **formed}, parents=[other]), note


def _apart(model: Checkpoint, whole: str, kinds: Sequence[Sequence[str]]) -> dict[str, Formed]:
    """Each expert's tensors out of one [experts, kinds * rows, columns]."""
    info = model.table[whole]
    rows = info.shape[1] // len(kinds)

    def part(expert: int, kind: int) -> Formed:
        def form() -> Tensor:
            return model.tensor(whole)[expert, kind * rows : (kind + 1) * rows]

        return Formed(
            TensorInfo(info.dtype, (rows, *info.shape[2:])), form, ((model, whole),), f"expert {expert}, {kind}"
        )

    return {name: part(e, k) for k, experts in enumerate(kinds) for e, name in enumerate(experts)}


def _together(model: Checkpoint, kinds: Sequence[Sequence[str]]) -> Formed:
    """One tensor [experts, kinds * rows, columns] of each expert's."""
    info = model.table[kinds[0][0]]
    shape = (len(kinds[0]), len(kinds) * info.shape[0], *info.shape[1:])

    def form() -> Tensor:
        import torch

        return torch.cat([torch.stack([model.tensor(name) for name in experts]) for experts in kinds], 1)

    reads = tuple((model, name) for experts in kinds for name in experts)
    return Formed(TensorInfo(info.dtype, shape), form, reads, f"{len(kinds)} kinds of experts")
