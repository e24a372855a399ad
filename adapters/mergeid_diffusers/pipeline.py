"""What a pipeline's folder holds, as its ``model_index.json`` says: a network in each sub-folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mergeid.plugins import Contents, MergeidError

INDEX = "model_index.json"
WEIGHTS = (".safetensors", ".bin")


def contents(names: Sequence[str], read: Callable[[str], Any]) -> Contents | None:
    """The sub-folders of a pipeline that hold weights; None where it is none.

    Raises `MergeidError` for an index that cannot be read."""
    if INDEX not in names:
        return None
    index = read(INDEX)
    if not isinstance(index, Mapping):
        raise MergeidError(f"{INDEX} is not a table; expected the index that diffusers writes")
    components = {
        str(name): list(entry)
        for name, entry in index.items()
        if isinstance(entry, Sequence) and not isinstance(entry, str) and len(entry) == 2 and entry[1] is not None
    }
    with_weights = [name for name in components if any(n.startswith(f"{name}/") and n.endswith(WEIGHTS) for n in names)]
    if not with_weights:
        return None
    parts = {n: read(f"{n}/config.json") if f"{n}/config.json" in names else {} for n in with_weights}
    kinds = {n: [str(x) for x in components[n]] for n in with_weights}
    stated = {k: v for k, v in index.items() if k not in components and k != "_diffusers_version"}
    return Contents(tuple(with_weights), {**stated, "components": kinds, "parts": parts})
