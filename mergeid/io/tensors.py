"""The one door through which weights enter: whatever has tensors by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from mergeid.plugins import TensorInfo

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


class TensorSource(Protocol):
    """Weights by name: what lies in a file or folder, in a live module, or is formed from several of these (LoRA on its
    base, slices of layers).

    Attributes:
        source: what the user named.
        table: tensor name -> dtype and shape, in the order in which tensors are best read.
        file_of: tensor name -> the file that messages name.
        metadata: what files say of themselves.
        config: what a config.json says; None: there is none.
    """

    source: str
    table: dict[str, TensorInfo]
    file_of: dict[str, Path]
    metadata: dict[str, str]
    config: dict[str, Any] | None

    @property
    def mapped(self) -> bool:
        """Whether the tensors lie in files that can be mapped, so that `raw` gives them."""
        ...

    def raw(self, name: str) -> memoryview:
        """The bytes of one tensor as they lie in its file. Not to be written into."""
        ...

    def tensor(self, name: str) -> Tensor:
        """One tensor on the CPU, in its own format, mapped where it lies in a file. Not to be written into."""
        ...

    def origin(self, name: str) -> str:
        """Where the numbers of a tensor come from: the same words mean the same numbers, while files stay the same."""
        ...

    def release(self, name: str) -> None:
        """It is not needed for now: its memory may go."""
        ...
