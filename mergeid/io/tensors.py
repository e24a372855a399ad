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
        config: what a config.json says; None: there is none.
    """

    source: str
    table: dict[str, TensorInfo]
    file_of: dict[str, Path]
    config: dict[str, Any] | None

    def tensor(self, name: str) -> Tensor:
        """One tensor on the CPU, in its own format, mapped where it lies in a file. Not to be written into."""
        ...

    def release(self, name: str) -> None:
        """It is not needed for now: its memory may go."""
        ...
