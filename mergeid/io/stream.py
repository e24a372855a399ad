"""Writing a checkpoint as a stream, whole or not at all.

Headers are written first (all sizes are known), then one tensor after the other, into a hidden folder beside the
output. Only when everything is on the disk does it get its final name. A journal (`mergeid.io.journal`) says which
tensors are there already, where the writing was stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Union

from mergeid.basics import stopping
from mergeid.basics.reading import json_text
from mergeid.errors import MergeidError
from mergeid.io.beside import SUBFOLDERS
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.dtypes import dtype_name, tensor_bytes
from mergeid.io.journal import Journal
from mergeid.io.output import RECORD, check_output, is_single_file, record_path
from mergeid.io.publish import cannot_write, publish_folder, sync_folder, write_text
from mergeid.io.shards import Layout, Shard, lay_out
from mergeid.request.request import Output

if TYPE_CHECKING:
    from torch import Tensor

Chunks = Union["Tensor", Iterable[Union["Tensor", memoryview]]]
"""A tensor, or its elements (or their bytes) in row-major order in pieces."""

COMMIT = 1 << 27
"""Bytes after which what is written is secured and counts as done: so much is lost where a process is killed."""


class CheckpointWriter:
    """Context manager that writes one checkpoint; leaving it without an exception makes the output appear.

    Args:
        output: a ``.safetensors`` file or a folder, replaced and resumed as it says.
        like: gives names, shapes, order, sharding, metadata and (where `dtypes` is silent) dtypes.
        dtypes: tensor name -> dtype of the output (``"F32"``).
        companions: files that belong beside the weights; copied into a folder output.
        replace: companion name -> new content, for those that must change (a config's dtype) or are new.
        inputs: further files and folders that the output must not overwrite (those of `like` never are).
        name: of the file in a folder, where `like` lies in no file.
        request: of what the output is made and how, as JSON; what was stopped goes on only where it is the same.

    Attributes:
        output: where it will lie, links resolved.
        journal: the steps that are done, and a folder for whatever is kept between them; once the context is entered.
        record: entries of ``mergeid.json``; None: there is none.

    Raises:
        MergeidError: see `check_output` and `Journal`; disk full or not writable; a tensor missing, unknown, or of a
            wrong size.
    """

    journal: Journal

    def __init__(
        self,
        output: Output,
        *,
        like: Checkpoint,
        dtypes: Mapping[str, str] | None = None,
        companions: Iterable[Path] = (),
        replace: Mapping[str, str] | None = None,
        inputs: Iterable[Path] = (),
        name: str = "model.safetensors",
        request: Mapping[str, Any] | None = None,
    ) -> None:
        self._like = like
        self._asked, self._request = output, request or {}
        self._inputs = [*([like.path] if like.files else []), *like.files, *inputs]
        self.output = self._checked()
        self._single = is_single_file(self.output)
        single = self.output.name if self._single else None
        self._layout: Layout = lay_out(
            like, single=single, dtypes=dtypes or {}, name=name, shard_size=output.shard_size
        )
        self._shard_of = {name: shard for shard in self._layout.shards for name in shard.tensors}
        self.record: Mapping[str, Any] | None = None
        self._companions = [] if self._single else list(companions)
        self._replace = dict(replace or {})
        self._open: dict[str, IO[bytes]] = {}
        self._unsecured = 0

    def __enter__(self) -> CheckpointWriter:
        headers = [hashlib.sha256(shard.header).hexdigest() for shard in self._layout.shards]
        request = {**self._request, "tensors": headers}
        with self._explained():
            self.journal = Journal(self.output, request, resume=self._asked.resume)
        try:
            self._check_space()
            with self._explained():
                if not self._single:
                    self.journal.staged.mkdir(exist_ok=True)
                for shard in self._layout.shards:
                    place = self._place(shard)
                    place.parent.mkdir(exist_ok=True)
                    file = open(place, "r+b" if place.exists() else "xb", buffering=0)
                    self._open[shard.name] = file
                    _write_all(file, memoryview(shard.header))
        except BaseException:
            self._discard(failed=False)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard(failed=kind is not None and not issubclass(kind, MergeidError))

    def __contains__(self, name: str) -> bool:
        """Whether a tensor is written already."""
        return _step(name) in self.journal

    def write(self, name: str, tensor: Chunks) -> None:
        """Write one tensor, whole or in pieces, in any order of tensors."""
        if name not in self._shard_of:
            raise MergeidError(f"tensor {name!r} has no place in {self.output}; expected the names of {self._like!r}")
        shard = self._shard_of[name]
        info = shard.tensors[name]
        file = self._open[shard.name]
        at, end = shard.spans[name]
        file.seek(at)
        for piece in _pieces(tensor):
            if isinstance(piece, memoryview):
                view = piece
            elif dtype_name(piece.dtype) == info.dtype:
                view = tensor_bytes(piece)
            else:
                raise MergeidError(f"tensor {name!r} is {piece.dtype}; the output's header says {info.dtype}")
            at += len(view)
            if at > end:
                break
            with self._explained():
                _write_all(file, view)
        if at != end:
            raise MergeidError(f"tensor {name!r} has a wrong size; the output's header says {list(info.shape)}")
        self.journal.note(_step(name))
        self._unsecured += self.size(name)
        if self._unsecured >= COMMIT:
            self.commit()

    def commit(self) -> None:
        """Secure what is written, and with it every step that was noted in the journal."""
        with self._explained():
            self.journal.commit(file.fileno() for file in self._open.values())
        self._unsecured = 0

    def paths(self) -> list[Path]:
        """The files that make up the output, record included."""
        found = [self.output if self._single else self.output / s.name for s in self._layout.shards]
        found += [self.output / name for name in self._layout.indices]
        inside = [self._inside(path) for path in self._companions]
        inside += [Path(name) for name in self._replace if not self._single and Path(name) not in inside]
        found += [self.output / path for path in inside]
        return found if self.record is None else [*found, record_path(self.output)]

    def order(self) -> list[str]:
        """All tensor names in the order of the bytes, file by file: the cheapest order to write in."""
        return list(self._shard_of)

    def size(self, name: str | None = None) -> int:
        """Bytes of one tensor, or of all weight files."""
        if name is None:
            return sum(shard.size for shard in self._layout.shards)
        begin, end = self._shard_of[name].spans[name]
        return end - begin

    def _record_text(self) -> str:
        record = {**(self.record or {}), "output": self.output.name}
        return json_text(record) + "\n"

    def _place(self, shard: Shard) -> Path:
        return self.journal.staged if self._single else self.journal.staged / shard.name

    def _inside(self, companion: Path) -> Path:
        folder = self._like.path if self._like.is_folder else self._like.path.parent
        if companion.is_relative_to(folder):
            return companion.relative_to(folder)
        sub = companion.parent.name
        return Path(sub, companion.name) if sub in SUBFOLDERS else Path(companion.name)

    def _check_space(self) -> None:
        places = [self._place(shard) for shard in self._layout.shards]
        need = self.size() - sum(place.stat().st_size for place in places if place.exists())
        free = shutil.disk_usage(self.output.parent)
        if free.total and free.free < need:
            raise MergeidError(
                f"disk full: {self.output} needs {need:,} bytes and {self.output.parent} has {free.free:,} free; "
                "nothing was written: free some space or choose another place (option -o)"
            )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what the system says into one sentence."""
        try:
            yield
        except OSError as error:
            raise MergeidError(cannot_write(error, self.output, "-o")) from None

    def _finish(self) -> None:
        missing = [n for n in self._shard_of if n not in self]
        if missing:
            raise MergeidError(f"{len(missing)} tensors were never written to {self.output} (first {missing[0]!r})")
        with self._explained():
            for file in self._open.values():
                os.fsync(file.fileno())
            if self._single:
                self._publish_file()
            else:
                self._fill_folder()
                self._publish_folder()
            sync_folder(self.output.parent)
            self.journal.forget_others()

    def _checked(self) -> Path:
        return check_output(self._asked.path or "", inputs=self._inputs, force=self._asked.force)

    def _publish_file(self) -> None:
        self._checked()  # it may have appeared meanwhile
        staged = self.journal.staged
        if self.record is not None:
            told = self.journal.folder / RECORD
            write_text(told, self._record_text())
            record = record_path(self.output)
            before = record.exists()
            with stopping.uninterrupted():
                os.replace(told, record)
                try:
                    os.replace(staged, self.output)
                except BaseException:
                    if not before:
                        record.unlink()
                    raise
        else:
            os.replace(staged, self.output)

    def _fill_folder(self) -> None:
        staged, written = self.journal.staged, {**self._replace, **self._layout.indices}
        for name, text in written.items():
            (staged / name).parent.mkdir(exist_ok=True)
            write_text(staged / name, text)
        own = {*(shard.name for shard in self._layout.shards), *written}
        for source in self._companions:
            if self._inside(source).as_posix() in own:
                continue
            target = staged / self._inside(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_text(target, source.read_bytes())
        if self.record is not None:
            write_text(staged / RECORD, self._record_text())
        sync_folder(staged)

    def _publish_folder(self) -> None:
        self._checked()
        publish_folder(self.journal.staged, self.output)

    def _discard(self, *, failed: bool) -> None:
        """Close whatever is temporary, and remove it unless work was stopped that will be resumed."""
        for file in self._open.values():
            file.close()
        self._open.clear()
        self.journal.close(failed=failed)


def _step(name: str) -> str:
    return f"tensor {name}"


def _pieces(tensor: Chunks) -> Iterable[Tensor | memoryview]:
    torch = sys.modules.get("torch")  # not imported for this: without it there are no tensors
    return [tensor] if torch is not None and isinstance(tensor, torch.Tensor) else tensor


def _write_all(file: IO[bytes], view: memoryview) -> None:
    while len(view):
        view = view[file.write(view) :]
