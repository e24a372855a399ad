"""A checkpoint whose tensors are formed from those of others when they are asked for: renamed, stacked, added up."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mergeid.io.checkpoint import Checkpoint
from mergeid.io.tensors import TensorSource
from mergeid.plugins import TensorInfo

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


@dataclass(frozen=True)
class Formed:
    """One tensor of a derived checkpoint.

    Attributes:
        info: its dtype and shape.
        form: gives it, on the CPU.
        reads: the checkpoints and names that it is formed from.
        how: what its numbers depend on besides those, in words that differ where the numbers may.
    """

    info: TensorInfo
    form: Callable[[], Tensor]
    reads: tuple[tuple[TensorSource, str], ...]
    how: str


@dataclass(eq=False, repr=False)
class Derived(Checkpoint):
    """A model that lies in no file as it is. What it is made of stays mapped, and nothing is kept in memory.

    Attributes:
        formed: tensor name -> how it is formed.
        parents: what it is made of.
        adapter: whether it is an adapter on its first parent.
        tokenizer: the folder of its tokenizer, where that is not its own.
    """

    formed: Mapping[str, Formed] = field(default_factory=dict)
    parents: tuple[Checkpoint, ...] = ()
    adapter: bool = False
    tokenizer: Path | None = None

    @property
    def tokenizer_folder(self) -> Path:
        return self.path if self.tokenizer is None else self.tokenizer

    @property
    def mapped(self) -> bool:
        return False

    def tensor(self, name: str) -> Tensor:
        return self.formed[name].form()

    def origin(self, name: str) -> str:
        one = self.formed[name]
        parts = [one.how, one.info.dtype, str(one.info.shape), *(source.origin(of) for source, of in one.reads)]
        return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()

    def release(self, name: str) -> None:
        for checkpoint, source in self.formed[name].reads:
            checkpoint.release(source)

    def with_alias(self, name: str, of: str) -> Checkpoint:
        return replace(
            self,
            table={**self.table, name: self.table[of]},
            file_of={**self.file_of, name: self.file_of[of]},
            formed={**self.formed, name: self.formed[of]},
        )

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        found = super().renamed(names)
        assert isinstance(found, Derived)
        return replace(found, formed={new: self.formed[old] for new, old in names.items()})

    def fingerprint(self, stop: threading.Event | None = None) -> dict[str, str]:
        return {f"{p.source}/{file}": digest for p in self.parents for file, digest in p.fingerprint(stop).items()}


def read_from(checkpoint: TensorSource, name: str) -> Formed:
    """A tensor of another checkpoint as it is."""
    return Formed(checkpoint.table[name], lambda: checkpoint.tensor(name), ((checkpoint, name),), "as it is")


def origins(checkpoints: Iterable[Checkpoint]) -> str:
    """One digest of where all tensors of these come from."""
    found = hashlib.sha256()
    for checkpoint in checkpoints:
        for name in checkpoint.table:
            found.update(f"{name}\n{checkpoint.origin(name)}\n".encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def same_numbers(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two models are the same weights of the same files (stacks and adapters of one file may differ)."""
    if not len(one.files) == len(other.files) > 0 or not all(map(os.path.samefile, one.files, other.files)):
        return False
    if isinstance(one, Derived) or isinstance(other, Derived):
        return one.table == other.table and all(one.origin(name) == other.origin(name) for name in one.table)
    return True


def derived(
    source: str,
    like: Checkpoint,
    formed: Mapping[str, Formed],
    *,
    parents: Iterable[Checkpoint],
    config: dict[str, Any] | None = None,
) -> Derived:
    """A checkpoint of these tensors, with the folder, the tokenizer and the companions of `like`.

    Args:
        source: what messages call it.
        parents: all that it is formed from.
        config: in place of that of `like`.
    """
    made = tuple(dict.fromkeys(parents))
    files: tuple[Path, ...] = tuple(dict.fromkeys(f for p in (like, *made) for f in p.files))
    return Derived(
        source=source,
        path=like.path,
        files=files,
        table={name: one.info for name, one in formed.items()},
        file_of=dict.fromkeys(formed, like.path),
        metadata=dict(like.metadata),
        config=like.config if config is None else config,
        is_folder=like.is_folder,
        config_changed=config is not None or like.config_changed,
        beside=dict(like.beside),
        tokenizer=None if like.tokenizer_folder == like.path else like.tokenizer_folder,
        formed=dict(formed),
        parents=made,
    )
