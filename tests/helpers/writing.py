"""A checkpoint written in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mergeid.io.checkpoint import Checkpoint
from mergeid.io.stream import CheckpointWriter, Chunks


def write_checkpoint(
    output: str | Path,
    tensors: Iterable[tuple[str, Chunks]] | Callable[[str], Chunks],
    *,
    like: Checkpoint,
    record: Mapping[str, Any] | None = None,
    **told: Any,
) -> list[Path]:
    """Tensors in any order, or a function from name to tensor, through `CheckpointWriter`."""
    writer = CheckpointWriter(output, like=like, **told)
    writer.record = record
    with writer:
        pairs = ((name, tensors(name)) for name in writer.order()) if callable(tensors) else tensors
        for name, tensor in pairs:
            writer.write(name, tensor)
    return writer.paths()
