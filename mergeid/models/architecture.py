"""Which architecture a checkpoint, a config or a name means."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from mergeid.errors import MergeidError, shown
from mergeid.io.building import BARE, Room, naming, within
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.lora import refuse_adapter
from mergeid.io.tensors import TensorSource
from mergeid.nn.names import plain_table
from mergeid.plugins import Adapter, Architecture, KnowsNames, adapter_names, get_adapter, near_names

NEAR = 4
"""Near names that a refusal lists."""


def find_architecture(checkpoint: Checkpoint, arch: str | None = None) -> tuple[Adapter, Architecture]:
    """The architecture of a checkpoint: named, in its config or metadata, or read off its tensors.

    Args:
        arch: ``timm/resnet18``, ``transformers/bert``, a bare name, or the path of a config.json.

    Raises `MergeidError` when nothing fits, when several libraries do, or for an unknown name."""
    if checkpoint.files:
        refuse_adapter(checkpoint)
    config, table = stated_config(checkpoint, arch), plain_table(checkpoint.table)
    if arch is not None and not arch.endswith(".json"):
        return resolve_name(arch, table, config)
    found = []
    for name in adapter_names():
        adapter = get_adapter(name)
        room = within(Room.of(table), checkpoint.source) if config is not None else nullcontext()
        with naming(checkpoint.source), room:
            match = adapter.recognise(table, config, checkpoint.metadata)
        if match is not None:
            found.append((adapter, match))
    if len(found) == 1:
        return found[0]
    if found:
        raise MergeidError(
            f"{checkpoint.source} could be any of {', '.join(a.id for _, a in found)}; specify one with --arch"
        )
    hints = [h(table) for n in adapter_names() if (h := getattr(get_adapter(n), "nearest", None))]
    near = f" (nearest: {'; '.join(h for h in hints if h)})" if any(hints) else ""
    named = f"{arch} and " if arch is not None else ""
    raise MergeidError(
        f"cannot tell the architecture of {checkpoint.source} from {named}its {len(checkpoint.table)} tensors{near}; "
        f"specify it with --arch (timm/NAME, transformers/TYPE or a config.json), or put its config.json beside it"
    )


def stated_config(checkpoint: TensorSource, arch: str | None) -> dict[str, Any] | None:
    """The config that a checkpoint is built from: the file that `arch` names, else its own. Raises `MergeidError` where
    there is no such file."""
    if arch is None or not arch.endswith(".json"):
        return checkpoint.config
    from mergeid.basics.reading import read_table

    if not os.path.isfile(os.path.expanduser(arch)):
        raise MergeidError(f"--arch {arch}: no such config file")
    return read_table(arch, "the model's config.json")


def check_named(checkpoint: Checkpoint, arch: str | None) -> None:
    """Raises `MergeidError` for an ``--arch`` that names nothing, also where no network is built. Libraries are
    imported only for a name that is not known without them."""
    if arch is None or checkpoint.module is not None:
        return
    config = stated_config(checkpoint, arch)
    if not arch.endswith(".json") and not _known_at_once(arch, config):
        resolve_name(arch, None, config)


def _known_at_once(arch: str, config: Mapping[str, Any] | None) -> bool:
    prefix, _, rest = arch.partition("/")
    libraries, name = ([prefix], rest) if rest and prefix in adapter_names() else (adapter_names(), arch)
    found = (get_adapter(n) for n in libraries)
    return any(isinstance(adapter, KnowsNames) and adapter.at_hand(name, config) for adapter in found)


def resolve_name(
    arch: str, table: Mapping[str, Any] | None, config: Mapping[str, Any] | None
) -> tuple[Adapter, Architecture]:
    """The architecture of that name: ``adapter/name``, or a name that one adapter knows.

    Raises `MergeidError` for an unknown one, with near names."""
    prefix, slash, rest = arch.partition("/")
    if not rest and prefix in adapter_names():
        raise MergeidError(
            f"--arch {arch} names a library without an architecture; expected {prefix}/NAME, and mergeid adapters "
            f"'{prefix}/*' lists the names"
        )
    if rest and prefix in adapter_names():
        adapter = get_adapter(prefix)
        return adapter, adapter.resolve(rest, table, config)
    names = {n: set(get_adapter(n).architectures()) for n in adapter_names()}
    known = [n for n, names_of in names.items() if arch in names_of]
    if len(known) == 1:
        adapter = get_adapter(known[0])
        return adapter, adapter.resolve(arch, table, config)
    if known:
        raise MergeidError(
            f"{arch!r} is the name of several architectures; give {' or '.join(f'{k}/{arch}' for k in known)}"
        )
    libraries = {x: n for n, names_of in names.items() for x in names_of}
    near = [f"{libraries[x]}/{x}" for x in near_names(rest or arch, libraries, NEAR)]
    expected = f"expected LIBRARY/NAME, LIBRARY one of {', '.join(names)}"
    what = f"unknown architecture {shown(arch)}"
    if slash and prefix:
        what = f"no library {shown(prefix)} in {shown(arch)}"
    raise MergeidError(f"--arch: {what}; {expected}" + (f"; near names are {', '.join(near)}" if near else ""))


def described_by(path: str, config: Mapping[str, Any]) -> tuple[Adapter, Architecture]:
    """The architecture that a config.json alone describes. Raises `MergeidError` where it does not say which."""
    for name in adapter_names():
        adapter = get_adapter(name)
        with naming(path), within(BARE, path):
            found = adapter.recognise({}, config, {})
        if found is not None:
            return adapter, found
    raise MergeidError(
        f'{path} does not name an architecture; expected a config.json with "model_type" (transformers) '
        'or "architecture" (timm)'
    )
