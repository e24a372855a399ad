"""Recognising low-rank adapters: files that hold an update of a model, not a model."""

from __future__ import annotations

import re

from mergeid.errors import MergeidError
from mergeid.io.checkpoint import Checkpoint

ADAPTER_CONFIG = "adapter_config.json"
_FACTOR = re.compile(r"(^|[._])lora[._](A|B|embedding_A|embedding_B|magnitude_vector|up|down|mid)([._]|$)")
"""PEFT, diffusers and kohya name the factors of an update so."""


def refuse_adapter(checkpoint: Checkpoint) -> None:
    """Raises `MergeidError` for the folder of an adapter, and for a model whose tensors are factors of an update:
    the mean of the factors is not the mean of the updates."""
    cure = "merge it into its base first (PEFT's merge_and_unload) and use the resulting model"
    files = [p.name for p in checkpoint.files]
    alone = bool(files) and all(name.startswith("adapter_model") for name in files)
    beside = checkpoint.is_folder and (checkpoint.path / ADAPTER_CONFIG).is_file() and "model.safetensors" not in files
    if alone or (beside and checkpoint.index is None):
        raise MergeidError(f"{checkpoint.source} is a PEFT adapter (LoRA or the like), not a whole model; {cure}")
    factor = next((name for name in checkpoint.table if _FACTOR.search(name)), None)
    if factor is not None:
        raise MergeidError(
            f"{checkpoint.source} holds LoRA factors (first: {factor!r}), whose mean is not the mean of the updates; "
            f"{cure}"
        )
