"""Copies of tensors that are kept for a while: in memory while there is room, in mapped files beyond."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import torch
from torch import Tensor

ROOM = 1 << 28
"""Bytes of copies that are kept in memory."""
SMALL = 1 << 18
"""Bytes of a tensor that is not worth a file."""


class Shelf:
    """Keeps copies. A file is gone with the tensor that it was made for."""

    def __init__(self) -> None:
        self._held = self._count = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def keep(self, value: Tensor) -> Tensor:
        """A copy of a tensor. On the CPU it lies in a file once `ROOM` bytes are held."""
        found = self.take(value)
        return value.clone() if found is value else found

    def take(self, value: Tensor) -> Tensor:
        """A tensor that nobody else needs: itself while there is room, else a copy in a file."""
        size = value.numel() * value.element_size()
        if value.device.type != "cpu" or size <= SMALL or self._held + size <= ROOM:
            self._held += size
            return value
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="mergeid-", ignore_cleanup_errors=True)
        path, self._count = Path(self._folder.name) / str(self._count), self._count + 1
        kept = torch.from_file(str(path), shared=True, size=value.numel(), dtype=value.dtype).view(value.shape)
        with contextlib.suppress(OSError):  # Windows keeps what is mapped
            path.unlink()
        return kept.copy_(value)
