"""Tensors that are the same in the network and have other names in the files.

A head put on or taken off, wrappers of training, names of an older library version: the adapter says which tensor of a
file is which of the network, so that a model whose names differ from the first one's is read under the first one's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mergeid.errors import MergeidError
from mergeid.io.building import Room, build
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.derived import derived, read_from
from mergeid.io.tensors import TensorSource
from mergeid.models.architecture import find_architecture
from mergeid.models.converted import places_of
from mergeid.models.experts import as_in_first
from mergeid.nn.names import is_asymmetric, plain_table


@dataclass
class SameNames:
    """Models under the first one's names.

    Attributes:
        models: in the order given.
        dropped: names that no longer occur.
        notes: what was renamed, left out or kept.
    """

    models: list[Checkpoint]
    dropped: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def same_names(models: Sequence[Checkpoint], arch: str | None = None) -> SameNames:
    """Read every further model under the first one's names. Nothing is built where names are equal already.

    Args:
        models: all that meet, the base too.
        arch: the architecture where it cannot be told.
    """
    found = SameNames(list(models))
    first = models[0]
    for i, other in enumerate(models[1:], 1):
        if other.table.keys() == first.table.keys() or not (first.files and other.files):
            continue
        if is_asymmetric(first.table) or is_asymmetric(other.table):
            continue  # fixed parts are no names of something else
        _rename(found, i, first, other, arch)
    return found


def _rename(found: SameNames, at: int, first: Checkpoint, other: Checkpoint, arch: str | None) -> None:
    known = _keys(found, at, first, other, arch)
    if known is None:
        return
    other = found.models[at]
    ours, theirs = known
    name_of = {key: name for name, key in ours.items()}
    renamed = {name: name_of[key] for name, key in theirs.items() if key in name_of}
    if 2 * len(renamed) < max(len(other.table), len(first.table)):
        return  # different architectures, which are called so later
    another = (first.config or {}).get("architectures") != (other.config or {}).get("architectures")
    # What the first model's network does not have: buffers that the library ignores, and another head.
    unused = [n for n in other.table if n not in theirs and n not in first.table]
    if any(not another and n.endswith(".weight") for n in unused):
        return
    taken = set(renamed.values())
    lacking = [n for n in first.table if n not in taken and n not in other.table]
    kept = [n for n in lacking if another or n not in ours]
    changed = {old: new for old, new in renamed.items() if old != new}
    if not (changed or unused or kept):
        return
    table = {renamed.get(n, n): n for n in other.table if n not in unused}
    config = other.config
    if another and config is not None and first.config is not None and "architectures" in first.config:
        config = {**config, "architectures": first.config["architectures"]}
    if kept:
        formed = {new: read_from(other, old) for new, old in table.items()}
        formed |= {name: read_from(first, name) for name in kept}
        found.models[at] = derived(other.source, other, formed, parents=[other, first], config=config)
    else:
        found.models[at] = replace(other.renamed(table), config=config)
    found.dropped |= {*changed, *unused} - found.models[at].table.keys() - first.table.keys()
    if changed:
        old = next(iter(changed))
        found.notes.append(
            f"{len(changed)} tensors of {other.source} have different names in {first.source} (first: {old} is "
            f"{changed[old]}) and are read under those names"
        )
    for names, what in ((unused, f"only in {other.source}, and left out"), (kept, f"only in {first.source}, and kept")):
        if names:
            more = f" and {len(names) - 1} more are" if len(names) > 1 else " is"
            found.notes.append(f"{names[0]}{more} {what}")


def _keys(
    found: SameNames, at: int, first: Checkpoint, other: Checkpoint, arch: str | None
) -> tuple[dict[str, str], dict[str, str]] | None:
    """The keys of the first model's network that both files' tensors are; None where no network is known. The other's
    experts are put together, or taken apart, as the first one's are."""
    if (wrapped := _without_prefix(first, other)) is not None:
        return wrapped
    try:
        adapter, chosen = find_architecture(first, arch)
        network = build(adapter, chosen, Room.of(first.table), device="meta")
    except MergeidError:
        return None
    other, note = as_in_first(first, other, adapter, chosen, network)
    if note:
        found.models[at] = other
        found.notes.append(note)
    ours, theirs = (adapter.tensor_names(chosen, network, plain_table(c.table)) for c in (first, other))
    if note:  # those that the library stacks have no names in the network
        apart = {n: n for n in first.table.keys() & other.table.keys() if n not in ours}
        return {**ours, **apart}, {**theirs, **apart}
    parts = [places_of(c, adapter, network) for c in (first, other)]
    return {**ours, **parts[0]}, {**theirs, **parts[1]}


def _without_prefix(first: TensorSource, other: TensorSource) -> tuple[dict[str, str], dict[str, str]] | None:
    """Where one prefix before every name is all that differs, as wrappers put it there."""
    for longer, shorter in ((first, other), (other, first)):
        name = next(iter(shorter.table))
        full = next((n for n in longer.table if n.endswith(f".{name}")), None)
        prefix = "" if full is None else full.removesuffix(name)
        if prefix and {prefix + n for n in shorter.table} == longer.table.keys():
            bare = {n: n.removeprefix(prefix) for n in longer.table}
            plain = {n: n for n in shorter.table}
            return (bare, plain) if longer is first else (plain, bare)
    return None
