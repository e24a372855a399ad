"""A checkpoint on disk: what it holds, and its tensors read lazily from memory maps."""

from __future__ import annotations

import hashlib
import mmap
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid.errors import MergeidError
from mergeid.io.dtypes import dtype_name, torch_dtype
from mergeid.plugins import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

HASHED_AT_ONCE = 1 << 24
"""Bytes of a file that are hashed before they are let go of."""


def check_values(name: str, tensor: Tensor, source: str) -> None:
    """Raises `MergeidError` for a tensor on the meta device, and for a sparse one."""
    if tensor.is_meta:
        raise MergeidError(
            f"tensor {name!r} of {source} is on the meta device and holds no values; load its weights first"
        )
    if getattr(tensor, "is_sparse", False) or getattr(tensor, "is_sparse_csr", False):
        raise MergeidError(
            f"tensor {name!r} of {source} is sparse; expected a dense one, or a buffer that is not saved "
            "(persistent=False)"
        )


@dataclass(frozen=True)
class Part:
    """One of several networks in a folder.

    Attributes:
        folder: its sub-folder; ``""``: the folder itself.
        prefix: before the names of its tensors; in its files they stand without it.
        files: its weight files.
        index, index_metadata: as in `Checkpoint`.
    """

    folder: str
    prefix: str
    files: tuple[Path, ...]
    index: str | None = None
    index_metadata: Mapping[str, Any] = field(default_factory=dict)


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
        parts: the networks of a folder that holds several; none: it is one.
        beside: small files of an output that are not as they lie in the folder, by name (a chat template).
        module: the live module whose weights these are; None: they lie in files.
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
    parts: tuple[Part, ...] = ()
    beside: dict[str, str] = field(default_factory=dict)
    module: nn.Module | None = None
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

    def check_values(self) -> None:
        """Raises `MergeidError` as `check_values` for a tensor in memory."""
        for name, tensor in (self._tensors or {}).items():
            check_values(name, tensor, self.source)

    def tensor(self, name: str) -> Tensor:
        """One tensor on the CPU, backed by the mapped file (no copy). Do not write into it.

        Raises:
            KeyError: no such tensor.
            MergeidError: a dtype that torch cannot hold (sub-byte formats), or no values (meta tensors).
        """
        if self._tensors is not None and name in self._tensors:
            check_values(name, self._tensors[name], self.source)
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

    @property
    def tokenizer_folder(self) -> Path:
        """Where its tokenizer lies."""
        return self.path

    def raw(self, name: str) -> memoryview:
        """The bytes of one tensor of a mapped checkpoint, as they lie in the file. Do not write into them."""
        begin, end = self._spans[name]
        return memoryview(self._map(self.file_of[name]))[begin:end]

    def origin(self, name: str) -> str:
        """Where the numbers of a tensor come from: the same words mean the same numbers, while files stay the same."""
        return f"{self.file_of[name]} {self._spans.get(name, name)}"

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
            found._tensors = {**self._tensors, **({name: self._tensors[of]} if of in self._tensors else {})}
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
            found._tensors = {new: self._tensors[old] for new, old in names.items() if old in self._tensors}
        return found

    def take(self, other: Checkpoint) -> None:
        """Where the tensors of another lie, under its names."""
        self._spans |= other._spans
        if other._tensors is not None:
            self._tensors = {**(self._tensors or {}), **other._tensors}

    def fingerprint(self, stop: threading.Event | None = None) -> dict[str, str]:
        """SHA-256 of every weight file, by file name (computed once). `stop` ends it early, with an empty answer."""
        if self._hashes is None:
            hashes = {self.name_of(path): _sha256(path, stop) for path in self.files}
            if stop is not None and stop.is_set():
                return {}
            self._hashes = hashes
        return dict(self._hashes)

    def name_of(self, file: Path) -> str:
        """A weight file by its place in the folder."""
        return file.relative_to(self.path).as_posix() if file.is_relative_to(self.path) and self.parts else file.name

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            with open(path, "rb") as file:
                # Copy on write: torch wants a writable buffer, and the file stays as it is whatever happens.
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[path]


def _sha256(path: Path, stop: threading.Event | None) -> str:
    digest = hashlib.sha256()
    if not path.stat().st_size:
        return digest.hexdigest()
    # mapped: what is read would be copied first
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for begin in range(0, len(mapped), HASHED_AT_ONCE):
            if stop is not None and stop.is_set():
                break
            with memoryview(mapped) as whole, whole[begin : begin + HASHED_AT_ONCE] as part:
                digest.update(part)
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED, begin, min(HASHED_AT_ONCE, len(mapped) - begin))
    return digest.hexdigest()
