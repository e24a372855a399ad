"""From a path or a hub id to a checkpoint: files, folders of shards, pickles, adapters on their base."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid.basics.reading import read_table
from mergeid.errors import MergeidError
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.folders import contents_of, together
from mergeid.io.header import Header, read_header
from mergeid.io.weights import PICKLES, find_weights, pickle_refused, read_index
from mergeid.plugins import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

_PATH_LIKE = re.compile(r"^(\.|~|/|[A-Za-z]:\\)|\.(safetensors|json|bin|pt|pth|ckpt|pth\.tar)$")


def open_checkpoint(
    source: str | os.PathLike[str] | Checkpoint, *, revision: str | None = None, allow_pickle: bool = False
) -> Checkpoint:
    """Open a ``.safetensors`` file, a model folder, a hub id (``org/name``, ``org/name@revision``), or a PEFT adapter
    on its base (``BASE+ADAPTER``, or the adapter's folder alone where its config names a base at hand).

    A path that exists wins over a hub id. Headers are read and checked, tensors are not.

    Args:
        source: file, folder or hub id; a checkpoint that is open already is given back.
        revision: branch, tag or commit on the hub (or write ``org/name@revision``).
        allow_pickle: also read ``.bin``, ``.pt``, ``.pth``, ``.ckpt`` and ``.pth.tar``, through torch's
            restricted unpickler.

    Raises:
        MergeidError: anything that is wrong with it, in one sentence.
    """
    if isinstance(source, Checkpoint):
        return source
    text = os.fspath(source)
    if isinstance(text, str) and ("+" in text or os.path.isfile(os.path.join(text, "adapter_config.json"))):
        from mergeid.io.lora_forming import adapter_on_base

        formed = adapter_on_base(text, partial(open_checkpoint, allow_pickle=allow_pickle))
        if formed is not None:
            return formed
    path = Path(os.path.expanduser(text))  # which leaves the home of nobody as it is
    if not os.path.exists(path):
        if not isinstance(source, str) or _PATH_LIKE.search(text) or text.split("@")[0].count("/") != 1:
            raise MergeidError(
                f"no such file or folder: {text}; expected a .safetensors file, a model folder, or a hub id (org/name)"
            )
        from mergeid.io.hub import download

        path = download(text, revision=revision, allow_pickle=allow_pickle)
    elif revision is not None:
        raise MergeidError(f"--revision {revision} does not apply to {text}, which is on this machine")
    try:
        return (_open_folder if path.is_dir() else _open_file)(text, path, allow_pickle)
    except OSError as error:
        raise MergeidError(f"cannot read {error.filename or path}: {error.strerror or error}") from None


def _open_file(source: str, path: Path, allow_pickle: bool) -> Checkpoint:
    config = path.parent / "config.json"
    parsed = _config(config) if config.exists() else None
    if path.name.endswith(".index.json"):
        raise MergeidError(f"{path} is the index of a sharded checkpoint; name its folder instead: {path.parent}")
    if path.name.endswith(PICKLES) and path.stat().st_size:
        if not allow_pickle:
            raise MergeidError(pickle_refused(f"{path} is"))
        return _open_pickles(source, path, [path], parsed)
    return replace(_from_headers(source, path, {path: read_header(path)}), config=parsed)


def _config(path: Path) -> dict[str, Any]:
    return read_table(path, "the model's config.json")


def _open_folder(source: str, folder: Path, allow_pickle: bool) -> Checkpoint:
    found = contents_of(folder)
    if found is None:
        return _open_network(source, folder, allow_pickle)
    if found.folders == ("",):
        return replace(_open_network(source, folder, allow_pickle), config=found.config)
    return together(source, folder, found, lambda part: _open_network(source, part, allow_pickle))


def _open_network(source: str, folder: Path, allow_pickle: bool) -> Checkpoint:
    """The weights that lie directly in a folder."""
    names = [p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
    weights = find_weights(names, folder, allow_pickle=allow_pickle)
    config = _config(folder / "config.json") if (folder / "config.json").exists() else None
    shards: list[str]
    weight_map: dict[str, str] = {}
    metadata: dict[str, Any] = {}
    if weights.listing is not None:
        weight_map, metadata = read_index(folder / weights.listing)
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            if not (folder / shard).is_file():
                raise MergeidError(
                    f"{folder / weights.listing} lists the shard {shard}, which is missing; copy or download it again"
                )
    else:
        shards = [weights.name]
    if weights.pickled:
        return _open_pickles(source, folder, [folder / s for s in shards], config)
    found = _from_headers(source, folder, {folder / s: read_header(folder / s) for s in shards}, weight_map)
    return replace(found, config=config, is_folder=True, index=weights.listing, index_metadata=metadata)


def _from_headers(
    source: str, path: Path, headers: Mapping[Path, Header], weight_map: Mapping[str, str] | None = None
) -> Checkpoint:
    """Put the headers of all shards together; the index decides where a name occurs twice."""
    table: dict[str, TensorInfo] = {}
    file_of: dict[str, Path] = {}
    spans: dict[str, tuple[int, int]] = {}
    placed = weight_map or {}
    for file, header in headers.items():
        for name, info in header.tensors.items():
            if name in placed and placed[name] != file.name:
                continue
            if name in table:
                raise MergeidError(f"tensor {name!r} lies in both {file_of[name]} and {file}; expected it once")
            table[name], file_of[name], spans[name] = info, file, header.spans[name]
    for name, shard in placed.items():
        if name not in table:
            raise MergeidError(
                f"{path} is incomplete: the index places tensor {name!r} in {shard}, which lacks it; "
                "copy or download it again"
            )
    if not table:
        raise MergeidError(f"{path} holds no tensors; expected the weights of a model")
    return Checkpoint(
        source=source,
        path=path,
        files=tuple(headers),
        table=table,
        file_of=file_of,
        metadata={k: v for header in headers.values() for k, v in header.metadata.items()},
        file_metadata={file: header.metadata for file, header in headers.items()},
        _spans=spans,
    )


def _open_pickles(source: str, path: Path, files: list[Path], config: dict[str, Any] | None) -> Checkpoint:
    from mergeid.io.pickled import load_pickle

    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(load_pickle(file))
    found = Checkpoint.from_tensors(
        tensors, source=source, path=path, config=config, is_folder=len(files) > 1 or path.is_dir()
    )
    found.files = tuple(files)
    return found
