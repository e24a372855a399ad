"""What a sentence-transformers folder holds: the modules that its ``modules.json`` lists, one behind the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergeid.plugins import Contents, MergeidError

LISTING = "modules.json"
WEIGHTS = (".safetensors", ".bin")
SETTINGS = ("config.json", "_config.json")
ENCODER_SETTINGS = "sentence_bert_config.json"
LIBRARY = "sentence_transformers."
POOLED = "pooler_output"
NOT_SETTINGS = ("tokenizer_config.json", "preprocessor_config.json", "generation_config.json", "processor_config.json")


@dataclass(frozen=True)
class Step:
    """One module.

    Attributes:
        folder: its sub-folder; ``""`` is the folder itself.
        kind: its class (``"sentence_transformers.models.Dense"``).
    """

    folder: str
    kind: str

    @property
    def encodes(self) -> bool:
        """Whether it is a network of transformers."""
        return self.kind.rpartition(".")[2] in ("Transformer", "MLMTransformer")

    @property
    def prefix(self) -> str:
        """Before the names of its tensors."""
        return f"{self.folder}." if self.folder else ""


def contents(names: Sequence[str], read: Callable[[str], Any]) -> Contents | None:
    """Which modules of a folder have weights; None where there is no list of modules, or one that names no sub-folders,
    and where the encoder alone has weights and lies in the folder itself: that is a folder of transformers."""
    if LISTING not in names:
        return None
    try:
        listed = steps_of(read(LISTING))
    except MergeidError:
        return None
    folders = [s.folder for s in listed if any(n.endswith(WEIGHTS) for n in _inside(names, s.folder))]
    if folders in ([], [""]):
        return None
    settings = {
        s.folder: {n: read(f"{s.folder}/{n}".lstrip("/")) for n in _inside(names, s.folder) if _is_setting(n)}
        for s in listed
    }
    config = {
        "modules": [{"path": s.folder, "type": s.kind} for s in listed],
        "settings": {f: {n: c for n, c in own.items() if n != "config.json"} for f, own in settings.items()},
        "parts": {f: own.get("config.json", {}) for f, own in settings.items()},
    }
    return Contents(tuple(dict.fromkeys(folders)), config)


def unread(names: Sequence[str], read: Callable[[str], Any]) -> tuple[str, ...]:
    """The pooled output of a transformers encoder whose tokens the library's own modules go on with."""
    if LISTING not in names:
        return ()
    try:
        listed = steps_of(read(LISTING))
    except MergeidError:
        return ()
    encoders = [s for s in listed if s.encodes]
    if len(encoders) != 1 or not all(s.kind.startswith(LIBRARY) for s in listed):
        return ()
    file = f"{encoders[0].folder}/{ENCODER_SETTINGS}".lstrip("/")
    settings = read(file) if file in names else {}
    return () if POOLED in json.dumps(settings) else (POOLED,)


def steps_of(listing: Any) -> list[Step]:
    """The modules in the order in which they run. Raises `MergeidError` where it is no list of them."""
    found = []
    for entry in listing if isinstance(listing, list) else [None]:
        path, kind = (entry.get("path"), entry.get("type")) if isinstance(entry, Mapping) else (None, None)
        if not isinstance(path, str) or ".." in path or path.count("/") or "\\" in path:
            raise MergeidError(
                f"{LISTING} has an entry without the path of a sub-folder; expected the list that "
                "sentence-transformers writes"
            )
        found.append(Step(path, kind if isinstance(kind, str) else ""))
    return found


def _inside(names: Sequence[str], folder: str) -> list[str]:
    begin = f"{folder}/" if folder else ""
    return [r for n in names if n.startswith(begin) and "/" not in (r := n.removeprefix(begin))]


def _is_setting(name: str) -> bool:
    return name.endswith(SETTINGS) and name not in NOT_SETTINGS
