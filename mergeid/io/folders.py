"""Folders whose networks lie in several sub-folders, each with weights and a config of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergeid.basics.reading import read_json
from mergeid.io.checkpoint import Checkpoint, Part
from mergeid.plugins import Contents, KnowsFolders, adapter_names, get_adapter

PARTS = "parts"
"""Key of the config under which the configs of the sub-folders stand."""


def prefix_of(folder: str) -> str:
    """What stands before the names of a sub-folder's tensors."""
    return f"{folder.replace('/', '.')}." if folder else ""


def contents(names: Sequence[str], read: Callable[[str], Any]) -> Contents | None:
    """What an adapter says of a folder; None: its weights lie in it as usual."""
    if not any(n.endswith(".json") for n in names):
        return None
    for name in adapter_names():
        adapter = get_adapter(name)
        if isinstance(adapter, KnowsFolders) and (found := adapter.contents(names, read)) is not None:
            return found
    return None


def contents_of(folder: Path) -> Contents | None:
    """The same of a folder on this machine."""
    return contents(file_names(folder), lambda name: read_json(folder / name))


def file_names(folder: Path) -> list[str]:
    """Its files and those of its sub-folders, none of them hidden, sorted."""
    found = []
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_file():
            found.append(entry.name)
        elif entry.is_dir():
            found += [f"{entry.name}/{e.name}" for e in os.scandir(entry.path) if e.is_file() and e.name[0] != "."]
    return sorted(found)


def inside(names: Sequence[str], folder: str) -> list[str]:
    """Names of the files directly in a sub-folder, without it."""
    begin = f"{folder}/" if folder else ""
    rest = [n.removeprefix(begin) for n in names if n.startswith(begin)]
    return [n for n in rest if "/" not in n]


def together(source: str, folder: Path, found: Contents, opened: Callable[[Path], Checkpoint]) -> Checkpoint:
    """One checkpoint of all networks in a folder, names under the prefix of their sub-folder.

    Args:
        source: what messages call it.
        found: which sub-folders count.
        opened: opens the weights that lie directly in one.
    """
    networks = [(name, opened(folder / name)) for name in found.folders]
    whole = Checkpoint(source, folder, (), {}, {}, config=found.config, is_folder=True)
    parts = []
    for name, network in networks:
        prefix = prefix_of(name)
        inner = network.renamed({prefix + n: n for n in network.table}) if prefix else network
        whole.table |= inner.table
        whole.file_of |= inner.file_of
        whole.metadata |= inner.metadata
        whole.file_metadata |= inner.file_metadata
        whole.take(inner)
        parts.append(Part(name, prefix, network.files, network.index, network.index_metadata))
    return replace(whole, parts=tuple(parts), files=tuple(f for p in parts for f in p.files))
