"""A checkpoint on disk: what it holds, and its tensors read lazily from memory maps."""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid.basics.reading import read_table
from mergeid.errors import MergeidError
from mergeid.io.dtypes import dtype_name, torch_dtype
from mergeid.io.header import Header, read_header
from mergeid.io.weights import PICKLES, find_weights, pickle_refused, read_index
from mergeid.plugins import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

_PATH_LIKE = re.compile(r"^(\.|~|/|[A-Za-z]:\\)|\.(safetensors|json|bin|pt|pth|ckpt)$")


@dataclass(eq=False, repr=False)
class Checkpoint:
    """One model's weights. Nothing but headers is read until a tensor is asked for.

    Attributes:
        source: what the user typed.
        path: the file or the folder.
        files: the weight files, in the order of the table.
        table: tensor name -> dtype and shape, file by file, in the order in which the bytes lie in each.
        file_of: tensor name -> the file that holds it.
        metadata: the files' ``__metadata__``, put together.
        config: ``config.json`` of the folder, or beside a single file; None if there is none.
        is_folder: whether `path` is a folder.
        file_metadata: each file's own ``__metadata__``.
        index: name of the index file of a sharded checkpoint, else None.
        index_metadata: the ``metadata`` of that index.
        config_changed: whether `config` is not what the file says, so that an output needs it written.
    """

    source: str
    path: Path
    files: tuple[Path, ...]
    table: dict[str, TensorInfo]
    file_of: dict[str, Path]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    is_folder: bool = False
    file_metadata: dict[Path, dict[str, str]] = field(default_factory=dict)
    index: str | None = None
    index_metadata: dict[str, Any] = field(default_factory=dict)
    config_changed: bool = False
    _spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    _maps: dict[Path, mmap.mmap] = field(default_factory=dict)
    _tensors: dict[str, Tensor] | None = None
    _hashes: dict[str, str] | None = None

    def __repr__(self) -> str:
        return f"Checkpoint({self.source!r}, {len(self.table)} tensors in {len(self.files)} file(s))"

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        source: str = "<memory>",
        path: Path | None = None,
        config: dict[str, Any] | None = None,
        is_folder: bool = False,
    ) -> Checkpoint:
        """A checkpoint that lies in memory (a pickle that was loaded, a live module's state dict)."""
        where = path or Path(source)
        return cls(
            source=source,
            path=where,
            files=() if path is None else (path,),
            table={n: TensorInfo(dtype_name(t.dtype), tuple(t.shape)) for n, t in tensors.items()},
            file_of=dict.fromkeys(tensors, where),
            metadata={"format": "pt"},
            config=config,
            is_folder=is_folder,
            _tensors=dict(tensors),
        )

    def tensor(self, name: str) -> Tensor:
        """One tensor on the CPU, backed by the mapped file (no copy). Do not write into it.

        Raises:
            KeyError: no such tensor.
            MergeidError: a dtype that torch cannot hold (sub-byte formats).
        """
        if self._tensors is not None:
            return self._tensors[name].detach().cpu()
        import torch

        dtype, shape = self.table[name]
        begin, end = self._spans[name]
        try:
            kind = torch_dtype(dtype)
        except MergeidError as error:
            raise MergeidError(f"tensor {name!r} of {self.file_of[name]}: {error}") from None
        if begin == end:
            return torch.empty(shape, dtype=kind)
        file = self._map(self.file_of[name])
        if begin % kind.itemsize == 0:
            count = (end - begin) // kind.itemsize
            return torch.frombuffer(file, dtype=kind, count=count, offset=begin).reshape(shape)
        # A header of odd length (allowed, if rare) leaves the numbers unaligned: those need a copy.
        raw = torch.frombuffer(file, dtype=torch.uint8, count=end - begin, offset=begin)
        return raw.clone().view(kind).reshape(shape)

    @property
    def mapped(self) -> bool:
        """Whether the tensors lie in files that can be mapped (not in memory, not pickled)."""
        return self._tensors is None

    def raw(self, name: str) -> memoryview:
        """The bytes of one tensor of a mapped checkpoint, as they lie in the file. Do not write into them."""
        begin, end = self._spans[name]
        return memoryview(self._map(self.file_of[name]))[begin:end]

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors, mapped, not copied."""
        return {name: self.tensor(name) for name in self.table}

    def release(self, name: str) -> None:
        """Give the pages of a mapped tensor back to the system: it is read from disk again if used again."""
        file = self._maps.get(self.file_of[name])
        begin, end = self._spans.get(name, (0, 0))
        if file is not None and end > begin and hasattr(mmap, "MADV_DONTNEED"):
            first = begin - begin % mmap.PAGESIZE
            file.madvise(mmap.MADV_DONTNEED, first, end - first)

    def with_alias(self, name: str, of: str) -> Checkpoint:
        """The same checkpoint with one of its tensors under a second name too."""
        found = replace(
            self,
            table={**self.table, name: self.table[of]},
            file_of={**self.file_of, name: self.file_of[of]},
            _spans={**self._spans, **({name: self._spans[of]} if of in self._spans else {})},
        )
        if self._tensors is not None:
            found._tensors = {**self._tensors, name: self._tensors[of]}
        return found

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """The same checkpoint with these tensors alone: new name -> name of one of its tensors."""
        found = replace(
            self,
            table={new: self.table[old] for new, old in names.items()},
            file_of={new: self.file_of[old] for new, old in names.items()},
            _spans={new: self._spans[old] for new, old in names.items() if old in self._spans},
        )
        if self._tensors is not None:
            found._tensors = {new: self._tensors[old] for new, old in names.items()}
        return found

    def fingerprint(self, stop: threading.Event | None = None) -> dict[str, str]:
        """SHA-256 of every weight file, by file name (computed once). `stop` ends it early, with an empty answer."""
        if self._hashes is None:
            hashes = {path.name: _sha256(path, stop) for path in self.files}
            if stop is not None and stop.is_set():
                return {}
            self._hashes = hashes
        return dict(self._hashes)

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            with open(path, "rb") as file:
                # Copy on write: torch wants a writable buffer, and the file stays as it is whatever happens.
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[path]


def _sha256(path: Path, stop: threading.Event | None) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while (block := file.read(1 << 20)) and not (stop is not None and stop.is_set()):
            digest.update(block)
    return digest.hexdigest()


def open_checkpoint(
    source: str | os.PathLike[str] | Checkpoint, *, revision: str | None = None, allow_pickle: bool = False
) -> Checkpoint:
    """Open a ``.safetensors`` file, a model folder, a hub id (``org/name``, ``org/name@revision``), or a PEFT adapter
    on its base (``BASE+ADAPTER``, or the adapter's folder alone where its config names a base at hand).

    A path that exists wins over a hub id. Headers are read and checked, tensors are not.

    Args:
        source: file, folder or hub id; a checkpoint that is open already is given back.
        revision: branch, tag or commit on the hub (or write ``org/name@revision``).
        allow_pickle: also read ``.bin``, ``.pt``, ``.pth`` and ``.ckpt``, through torch's restricted unpickler.

    Raises:
        MergeidError: anything that is wrong with it, in one sentence.
    """
    if isinstance(source, Checkpoint):
        return source
    text = os.fspath(source)
    if isinstance(text, str) and ("+" in text or os.path.isfile(os.path.join(text, "adapter_config.json"))):
        from mergeid.io.lora_forming import adapter_on_base

        formed = adapter_on_base(text, allow_pickle)
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
    if path.suffix in PICKLES and path.stat().st_size:
        if not allow_pickle:
            raise MergeidError(pickle_refused(f"{path} is"))
        return _open_pickles(source, path, [path], parsed)
    return _from_headers(source, path, {path: read_header(path)}, config=parsed)


def _config(path: Path) -> dict[str, Any]:
    return read_table(path, "the model's config.json")


def _open_folder(source: str, folder: Path, allow_pickle: bool) -> Checkpoint:
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
    return _from_headers(
        source,
        folder,
        {folder / s: read_header(folder / s) for s in shards},
        weight_map=weight_map,
        config=config,
        is_folder=True,
        index=weights.listing,
        index_metadata=metadata,
    )


def _from_headers(
    source: str,
    path: Path,
    headers: Mapping[Path, Header],
    *,
    weight_map: Mapping[str, str] | None = None,
    **rest: Any,
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
        **rest,
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
