"""What users name as a model, and the weights that it means."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard, Union

from mergeid.io.checkpoint import Checkpoint
from mergeid.io.opening import open_checkpoint

if TYPE_CHECKING:
    from torch import Tensor, nn

Source = Union[str, "os.PathLike[str]", "nn.Module", Checkpoint]
"""File, folder, hub id, live module, or what is open already."""


def is_module(source: Source) -> TypeGuard[nn.Module]:
    """Whether it is a live module."""
    return not isinstance(source, (str, os.PathLike, Checkpoint))


def open_source(source: Source, *, allow_pickle: bool = False, revision: str | None = None) -> Checkpoint:
    """The weights that `source` means; for a live module those that it holds, with its config where it says of itself
    what a ``config.json`` says. Raises `MergeidError` for what cannot be read."""
    if isinstance(source, (str, os.PathLike, Checkpoint)):
        return open_checkpoint(source, revision=revision, allow_pickle=allow_pickle)
    from mergeid.models.offload import state_of

    to_dict: Callable[[], dict[str, Any]] | None = getattr(getattr(source, "config", None), "to_dict", None)
    state: Mapping[str, Tensor] = state_of(source)
    return Checkpoint.from_tensors(state, source=type(source).__name__, config=to_dict() if to_dict else None)
