"""A checkpoint written in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mergeid.io.checkpoint import Checkpoint
from mergeid.io.stream import CheckpointWriter, Chunks
from mergeid.request.request import Output


def write_checkpoint(
    output: str | Path,
    tensors: Iterable[tuple[str, Chunks]] | Callable[[str], Chunks],
    *,
    like: Checkpoint,
    record: Mapping[str, Any] | None = None,
    **told: Any,
) -> list[Path]:
    """Tensors in any order, or a function from name to tensor, through `CheckpointWriter`."""
    place = Output(output, **{k: told.pop(k) for k in ("force", "shard_size", "resume") if k in told})
    writer = CheckpointWriter(place, like=like, **told)
    writer.record = record
    with writer:
        pairs = ((name, tensors(name)) for name in writer.order()) if callable(tensors) else tensors
        for name, tensor in pairs:
            writer.write(name, tensor)
    return writer.paths()
