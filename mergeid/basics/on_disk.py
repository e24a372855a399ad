"""Tensors whose values lie on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mergeid.basics.stopping import TemporaryFolder
from mergeid.errors import MergeidError


def on_disk(value: Tensor) -> Tensor:
    """The same values, mapped from a temporary file that has no name any more: memory that the system can take back.

    Raises `MergeidError` where the disk is full."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    with TemporaryFolder() as folder:
        path = Path(folder) / "values"
        try:
            with path.open("wb") as file:
                file.write(flat.view(torch.uint8).numpy().data)
        except OSError as error:
            raise MergeidError(
                f"{folder} has no room for {flat.nbytes / 2**20:.0f} MiB of tensors "
                f"({error.strerror or error}); set TMPDIR to a folder on a larger disk"
            ) from error
        found = torch.from_file(str(path), shared=True, size=flat.numel(), dtype=flat.dtype)
    return found.reshape(value.shape)
