"""Pickled checkpoints, read only when the user allows it and only through torch's restricted unpickler."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mergeid.errors import MergeidError

if TYPE_CHECKING:
    from torch import Tensor

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training scripts put the state dict."""


def load_pickle(path: Path) -> dict[str, Tensor]:
    """The state dict in a ``.bin``/``.pt``/``.pth``/``.ckpt`` file, entries that are no tensors left out.

    Raises:
        MergeidError: damaged, needs code to load (refused even when pickles are allowed), or holds no tensors.
    """
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds, from UnpicklingError to RuntimeError
        reason = str(error).split("\n", 1)[0]
        raise MergeidError(
            f"{path} cannot be read as a pickled state dict ({reason}); expected plain tensors: "
            "save model.state_dict() as safetensors"
        ) from None
    for key in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping):
        raise MergeidError(f"{path} holds a {type(found).__name__}; expected a state dict (names and tensors)")
    tensors = {str(k): v for k, v in found.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise MergeidError(f"{path} holds no tensors; expected a state dict (names and tensors)")
    return tensors
