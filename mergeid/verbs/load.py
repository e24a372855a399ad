"""``load``: a model that runs, from whatever names it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergeid.io.opening import Source
from mergeid.request.boundary import verb
from mergeid.request.request import Example, Reading, Run

if TYPE_CHECKING:
    from mergeid.models.loaded import Loaded


@verb
def load(
    source: Source,
    *,
    arch: str | None = None,
    example_inputs: Any = None,
    outputs: Sequence[str] = (),
    revision: str | None = None,
    allow_pickle: bool = False,
    dequantise: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> Loaded:
    """A runnable model with its weights.

    Args:
        source: ``.safetensors`` file, folder, hub id, an open checkpoint, or a live module.
        arch: its architecture, if the files do not say.
        example_inputs: for a live module of no known library: a tensor, a tuple, or a dict of keywords.
        outputs: names or globs of those outputs of a live module that count (``"logits"``, ``"0"``); default: all.
        revision: branch, tag or commit of a hub id.
        dequantise: whether float8 and bitsandbytes weights are read as floating-point ones.
        seed: of the example inputs.

    Raises:
        MergeidError: not found, not recognised, or weights that do not fit the architecture.
    """
    from mergeid.models.load import load_model

    reading = Reading(
        arch, allow_pickle=allow_pickle, dequantise=dequantise, example=Example.of(example_inputs, outputs)
    )
    return load_model(source, reading, Run(device=device, seed=seed), revision=revision)
