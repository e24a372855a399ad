"""What lies in a model's folder (or hub repository): which files are its weights, and which sub-folders hold networks
with weights and a config of their own. Files are chosen by their names alone."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mergeid.basics.reading import read_json, read_table
from mergeid.errors import MergeidError
from mergeid.io.checkpoint import Checkpoint, Part
from mergeid.plugins import Contents, KnowsFolders, KnowsUnread, adapter_names, get_adapter

SAFETENSORS = ".safetensors"
INDEX = ".safetensors.index.json"
_INDEX = re.compile(r"\.safetensors\.index(\.\w+)?\.json$")
_SHARD = re.compile(r"-\d+-of-\d+")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pth.tar")
PICKLE_INDEX = ".bin.index.json"

_NOT_WEIGHTS = ("optimizer", "scheduler", "training_args", "rng_state", "scaler")
"""Beginnings of pickle file names that trainers leave beside the weights."""
FOREIGN = (".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".npz", ".keras", ".tflite")
"""Endings of weights in formats that are not read."""
DISTRIBUTED = (".distcp", "_model_states.pt", "_optim_states.pt")
"""Endings of files that hold a part of a model for each process (FSDP, DeepSpeed)."""
PARTS = "parts"
"""Key of the config under which the configs of the sub-folders stand."""


class Weights(NamedTuple):
    """The weight files of one model: their names, or the name of the index that lists them.

    Attributes:
        file: the only weight file; None if sharded.
        listing: the index of a sharded checkpoint; None otherwise.
        pickled: whether it takes a pickle to read them.
    """

    file: str | None
    listing: str | None
    pickled: bool

    @property
    def name(self) -> str:
        return self.file or self.listing or ""


def find_weights(names: Iterable[str], where: object, *, allow_pickle: bool = False) -> Weights:
    """Choose the weight files among a folder's file names, as the libraries that write them do.

    ``model.safetensors`` first, then its sharded form, then whatever single safetensors checkpoint there is;
    pickles only when there is no safetensors file.

    Args:
        names: file names without a folder part.
        where: the folder or repository, for the messages.

    Raises:
        MergeidError: no weights, several to choose from, shards without an index, or only pickles.
    """
    names = sorted(names)
    if "model.safetensors" in names:
        return Weights("model.safetensors", None, False)
    if "model" + INDEX in names:
        return Weights(None, "model" + INDEX, False)
    files, indices = _without_variants([n for n in names if n.endswith(SAFETENSORS)], names)
    listed = {_stem(i) for i in indices}
    loose = [n for n in files if not (_SHARD.search(n) and _SHARD.sub("", n.removesuffix(SAFETENSORS)) in listed)]
    if len(indices) + len(loose) > 1:
        raise MergeidError(_ambiguous(where, [*indices, *loose]))
    if indices:
        return Weights(None, indices[0], False)
    if loose:
        return Weights(loose[0], None, False)
    return _find_pickles(names, where, allow_pickle)


def _without_variants(files: list[str], names: list[str]) -> tuple[list[str], list[str]]:
    """Files and indices without the same weights in other formats (``….fp16.safetensors``,
    ``….fp16-00001-of-00002.safetensors`` and their ``….safetensors.index.fp16.json``)."""
    indices = {n: _stem(n) for n in names if _INDEX.search(n)}
    stems = {n.removesuffix(SAFETENSORS) for n in files} | set(indices.values())
    return (
        [n for n in files if _SHARD.sub("", n.removesuffix(SAFETENSORS)).rpartition(".")[0] not in stems],
        [n for n, stem in indices.items() if stem.rpartition(".")[0] not in stems],
    )


def _stem(index: str) -> str:
    """How the files begin that an index lists."""
    name, _, variant = index.removesuffix(".json").partition(INDEX.removesuffix(".json"))
    return name + variant


def _ambiguous(where: object, names: list[str]) -> str:
    if all("-of-" in n for n in names):
        return (
            f"{where} holds {len(names)} shards but no model.safetensors.index.json; "
            "expected the index that came with them: copy or download it again"
        )
    return f"{where} contains several checkpoints ({', '.join(names)}); name one of the files"


def is_weights(name: str) -> bool:
    """Whether a file can hold a model's weights, judged by its name."""
    return name.endswith(SAFETENSORS) or (name.endswith(PICKLES) and not name.startswith(_NOT_WEIGHTS))


def _find_pickles(names: list[str], where: object, allow_pickle: bool) -> Weights:
    pickles = [n for n in names if is_weights(n)]
    if not pickles:
        raise MergeidError(f"{where} contains no weights; {_instead(names, where)}")
    if not allow_pickle:
        raise MergeidError(pickle_refused(f"{where} contains only {', '.join(pickles[:3])},"))
    if "pytorch_model.bin" in names:
        return Weights("pytorch_model.bin", None, True)
    if "pytorch_model" + PICKLE_INDEX in names:
        return Weights(None, "pytorch_model" + PICKLE_INDEX, True)
    if len(pickles) > 1:
        raise MergeidError(_ambiguous(where, pickles))
    return Weights(pickles[0], None, True)


def _instead(names: Sequence[str], where: object) -> str:
    """What to do about a folder without weights, by what it holds in their place."""
    foreign = next((n for n in names if n.endswith(FOREIGN)), None)
    if foreign is not None:
        return f"{foreign} is in a format that mergeid does not read: convert the model to safetensors"
    below: list[str] = []
    if isinstance(where, Path) and where.is_dir():
        folders = [p for p in where.iterdir() if p.is_dir() and not p.name.startswith(".")]
        folders += [p for p in where.glob("snapshots/*") if p.is_dir()]
        held = {p: [f.name for f in p.iterdir() if f.is_file()] for p in folders}
        below = sorted(str(p) for p, inside in held.items() if "config.json" in inside and any(map(is_weights, inside)))
        parts = next((p.name for p in folders if any(n.endswith(DISTRIBUTED) for n in held[p])), None)
        if not below and parts is not None:
            return f"{parts} holds the parts of a distributed checkpoint: save the model as one with save_pretrained"
    if below:
        several = f", or another of its {len(below)} models" if len(below) > 1 else ""
        return f"expected a model's folder: name {below[0]}{several}"
    return "expected model.safetensors, or shards with model.safetensors.index.json"


def pickle_refused(subject: str) -> str:
    """The sentence that refuses a pickle."""
    return (
        f"{subject} a pickle that can run code when it is loaded; expected safetensors: convert it, or pass "
        "--allow-pickle if you trust where it comes from"
    )


def read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The weight map (tensor name -> shard's file name) and the metadata of an index file.

    Raises:
        MergeidError: broken JSON, no weight map, or a shard name that points outside the folder.
    """
    parsed = read_table(path, "the index that was written with the shards")
    weight_map = parsed.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MergeidError(f'{path} has no "weight_map"; expected the index that was written with the shards')
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise MergeidError(f"{path} places tensor {tensor!r} in {shard!r}; expected a file in the same folder")
    metadata = parsed.get("metadata")
    return weight_map, metadata if isinstance(metadata, dict) else {}


def prefix_of(folder: str) -> str:
    """What stands before the names of a sub-folder's tensors."""
    return f"{folder.replace('/', '.')}." if folder else ""


def contents(names: Sequence[str], read: Callable[[str], Any]) -> Contents | None:
    """What an adapter says of a folder; None: its weights lie in it as usual."""
    if not any(n.endswith(".json") for n in names):
        return None
    for name in adapter_names():
        adapter = get_adapter(name)
        if isinstance(adapter, KnowsFolders) and (found := adapter.contents(names, read)) is not None:
            return found
    return None


def contents_of(folder: Path) -> Contents | None:
    """The same of a folder on this machine."""
    return contents(file_names(folder), lambda name: read_json(folder / name))


def unread_of(folder: Path) -> frozenset[str]:
    """Outputs of a folder's network that the library it was written by never reads."""
    names = file_names(folder)
    adapters = map(get_adapter, adapter_names() if any(n.endswith(".json") for n in names) else ())
    knowing = (a for a in adapters if isinstance(a, KnowsUnread))
    return frozenset(name for a in knowing for name in a.unread(names, lambda n: read_json(folder / n)))


def file_names(folder: Path) -> list[str]:
    """Its files and those of its sub-folders, none of them hidden, sorted."""
    found = []
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_file():
            found.append(entry.name)
        elif entry.is_dir():
            found += [f"{entry.name}/{e.name}" for e in os.scandir(entry.path) if e.is_file() and e.name[0] != "."]
    return sorted(found)


def inside(names: Sequence[str], folder: str) -> list[str]:
    """Names of the files directly in a sub-folder, without it."""
    begin = f"{folder}/" if folder else ""
    rest = [n.removeprefix(begin) for n in names if n.startswith(begin)]
    return [n for n in rest if "/" not in n]


def together(folder: Path, found: Contents, opened: Callable[[Path], Checkpoint]) -> Checkpoint:
    """One checkpoint of all networks in a folder, names under the prefix of their sub-folder.

    Args:
        found: which sub-folders count.
        opened: opens the weights that lie directly in one.
    """
    networks = [(name, opened(folder / name)) for name in found.folders]
    whole = Checkpoint(os.fspath(folder), folder, (), {}, {}, config=found.config, is_folder=True)
    parts = []
    for name, network in networks:
        prefix = prefix_of(name)
        inner = network.renamed({prefix + n: n for n in network.table}) if prefix else network
        whole.table |= inner.table
        whole.file_of |= inner.file_of
        whole.metadata |= inner.metadata
        whole.file_metadata |= inner.file_metadata
        whole.take(inner)
        parts.append(Part(name, prefix, network.files, network.index, network.index_metadata))
    return replace(whole, parts=tuple(parts), files=tuple(f for p in parts for f in p.files))
