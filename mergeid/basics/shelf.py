"""Copies of tensors that are kept for a while: in memory while there is room, in mapped files beyond."""

from __future__ import annotations

from torch import Tensor

from mergeid.basics.on_disk import on_disk

ROOM = 1 << 28
"""Bytes of copies that are kept in memory."""
SMALL = 1 << 18
"""Bytes of a tensor that is not worth a file."""


class Shelf:
    """Keeps copies. A file is gone with the tensor that it was made for."""

    def __init__(self) -> None:
        self._held = 0

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
        return on_disk(value)
