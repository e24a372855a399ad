"""The one door for weights: from what users name as a model (a file, a folder, a hub id, an adapter on its base, a live
module) to its weights by name. Which of these it is, is decided here and nowhere else."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from mergeid.basics.reading import read_table
from mergeid.errors import MergeidError, MergeidWarning
from mergeid.io.checkpoint import Checkpoint, check_values
from mergeid.io.folders import PICKLES, contents_of, find_weights, is_weights, pickle_refused, read_index, together
from mergeid.io.header import Header, read_header
from mergeid.io.lora import ADAPTER_CONFIG
from mergeid.plugins import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

Source = Union[str, "os.PathLike[str]", "nn.Module", Checkpoint]
"""File, folder, hub id, live module, or what is open already."""
_PATH_LIKE = re.compile(r"^(\.|~|/|[A-Za-z]:\\)|\.(safetensors|json|bin|pt|pth|ckpt|pth\.tar)$")


def open_checkpoint(
    source: Source, *, revision: str | None = None, allow_pickle: bool = False, dequantise: bool = False
) -> Checkpoint:
    """Open a ``.safetensors`` file, a model folder, a hub id (``org/name``, ``org/name@revision``), a PEFT adapter on
    its base (``BASE+ADAPTER``, each of them named so, or the adapter's folder alone where its config names a base at
    hand), or a live module (its config where it says of itself what a ``config.json`` says).

    A path that exists wins over a hub id. Headers are read and checked, tensors are not.

    Args:
        source: what the user named; a checkpoint that is open already is given back.
        revision: branch, tag or commit on the hub (or write ``org/name@revision``).
        allow_pickle: also read ``.bin``, ``.pt``, ``.pth``, ``.ckpt`` and ``.pth.tar``, through torch's
            restricted unpickler.
        dequantise: read float8 and bitsandbytes weights as floating-point ones (`mergeid.io.dequantise`).

    Raises:
        MergeidError: anything that is wrong with it, in one sentence.
    """
    if isinstance(source, Checkpoint):
        found = source
    elif isinstance(source, (str, os.PathLike)):
        found = _at(os.fspath(source), isinstance(source, str), revision, allow_pickle, dequantise)
    else:
        found = _of_module(_live(source))
    if dequantise:
        from mergeid.io.dequantise import dequantised

        return dequantised(found)
    return found


def _at(text: str, named: bool, revision: str | None, allow_pickle: bool, dequantise: bool) -> Checkpoint:
    """What lies at a path, or (where it is `named`) on the hub."""
    found = _adapter(text, allow_pickle, dequantise)
    if found is None:
        path = Path(_home(text))
        if not os.path.exists(path):
            if not named or not _is_hub_id(text):
                raise MergeidError(
                    f"no such file or folder: {text}; expected a .safetensors file, a model folder, or a hub id "
                    "(org/name)"
                )
            from mergeid.io.hub import download

            path = download(text, revision=revision, allow_pickle=allow_pickle)
        elif revision is not None:
            raise MergeidError(f"--revision {revision} does not apply to {text}, which is on this machine")
        try:
            found = (_open_folder if path.is_dir() else _open_file)(path, allow_pickle)
        except OSError as error:
            raise MergeidError(f"cannot read {error.filename or path}: {error.strerror or error}") from None
    return replace(found, source=text)


def _is_hub_id(text: str) -> bool:
    """Whether it looks like ``org/name`` or ``org/name@revision``."""
    return not _PATH_LIKE.search(text) and text.split("@")[0].count("/") == 1


def module_of(source: Source) -> nn.Module | None:
    """The live module that is named, or that is open; None for all that lies in files."""
    if isinstance(source, Checkpoint):
        return source.module
    return None if isinstance(source, (str, os.PathLike)) else _live(source)


def _live(source: object) -> nn.Module:
    """What is no path has to be a module."""
    from torch import nn

    if isinstance(source, nn.Module):
        refuse_lazy(source)
        return source
    if isinstance(source, type) and issubclass(source, nn.Module):
        given, so = f"the class {source.__name__}", "make a module of it, which has weights"
    elif isinstance(source, Mapping):
        given, so = "a dict of tensors", "load it into its module, or save it as a .safetensors file"
    else:
        given, so = f"an object of type {type(source).__name__}", "name its file, or give its module"
    raise MergeidError(f"a model is {given}; expected a file, a folder, a hub id or a live module: {so}")


def refuse_lazy(module: nn.Module) -> None:
    """Raises `MergeidError` for a module with layers that get their weights when they are first run."""
    from torch.nn.parameter import is_lazy

    lazy = next((n for n, p in (*module.named_parameters(), *module.named_buffers()) if is_lazy(p)), None)
    if lazy is not None:
        raise MergeidError(
            f"parameter {lazy!r} of {type(module).__name__} has no shape yet (a lazy layer); run the model once first"
        )


def is_live(source: Source) -> bool:
    """Whether it is a live module."""
    return module_of(source) is not None


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a live module, with the values of what Accelerate's hooks bring in as each layer runs."""
    if not has_hooks(module):
        from mergeid.basics.state import only_tensors

        return only_tensors(module.state_dict())
    from accelerate.utils.modeling import get_state_dict_offloaded_model

    return {k: v.to("cpu") for k, v in get_state_dict_offloaded_model(module).items()}


def values_of(module: nn.Module) -> dict[str, Tensor]:
    """`state_of` a module whose tensors all hold values. Raises `MergeidError` as `check_values`."""
    found = state_of(module)
    for name, value in found.items():
        check_values(name, value, type(module).__name__)
    return found


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks of Accelerate move its weights."""
    return any(hasattr(m, "_hf_hook") for m in module.modules())


def of_one_wrapping(models: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """The models; where torch wraps only some live ones (compiled, data-parallel, averaged), what is inside, and a note
    that says so."""
    modules = [module_of(m) for m in models]
    if any(m is None for m in modules) or len({tuple(m.state_dict()) for m in modules if m is not None}) == 1:
        return list(models), []
    inside = [_inside(m) for m in modules]
    if len({frozenset(m.state_dict()) for m in inside}) > 1:
        return list(models), []
    kinds = sorted({type(m).__name__ for m, inner in zip(modules, inside, strict=True) if m is not inner})
    return inside, [f"not all models are wrapped ({', '.join(kinds)}): what is inside was taken, with its own names"]


def _inside(module: Any) -> Any:
    children = list(module.named_children())
    while type(module).__module__.startswith("torch.") and [n for n, _ in children] in (["module"], ["_orig_mod"]):
        module = children[0][1]
        children = list(module.named_children())
    return module


def _of_module(module: nn.Module) -> Checkpoint:
    to_dict: Callable[[], dict[str, Any]] | None = getattr(getattr(module, "config", None), "to_dict", None)
    config = to_dict() if to_dict else None
    found = Checkpoint.from_tensors(state_of(module), source=type(module).__name__, config=config)
    return replace(found, module=module)


def _home(text: str) -> str:
    """With a leading ``~`` written out, but for the home of nobody, which is left as it is."""
    return os.path.expanduser(text)


def _adapter(text: str, allow_pickle: bool, dequantise: bool) -> Checkpoint | None:
    """``BASE+ADAPTER``, or an adapter's folder whose config names a base that is at hand; None for anything else.

    Raises:
        MergeidError: the base is not at hand, or the adapter does not fit it.
    """
    under, plus, adapter = text.rpartition("+")
    if plus and under and _is_hub_id(adapter) and not (os.path.exists(_home(adapter)) or os.path.exists(_home(text))):
        from mergeid.io.hub import download

        adapter = str(download(adapter))
    apart = bool(plus and under) and os.path.isdir(_home(adapter)) and not os.path.exists(_home(text))
    folder = Path(_home(adapter if apart else text))
    if not os.path.isfile(folder / ADAPTER_CONFIG) or (not apart and _holds_model(folder)):
        if apart:
            raise MergeidError(f"{adapter} in {text} is not a PEFT adapter; expected a folder with {ADAPTER_CONFIG}")
        return None
    from mergeid.io.lora_forming import LoraConfig, laid_on

    told = LoraConfig.read(folder / ADAPTER_CONFIG)
    if not apart:
        places = [Path(_home(told.base)), folder / told.base, folder.parent / told.base] if told.base else []
        place = next((p for p in places if p.is_dir() and p.resolve() != folder.resolve()), None)
        if place is None:
            why = f"has the base {told.base}, which is not on this machine" if told.base else "does not name its base"
            raise MergeidError(f"{text} is a PEFT adapter (LoRA) and {why}; name both as BASE+{text}")
        under = str(place)
    opened = open_checkpoint(under, allow_pickle=allow_pickle, dequantise=dequantise)
    if apart and told.base is not None and _another(told.base, opened):
        warnings.warn(
            f"{adapter} was trained on {told.base}, and is laid on {under} as requested", MergeidWarning, stacklevel=2
        )
    held = [folder / f"adapter_model{ending}" for ending in (".safetensors", ".bin")]
    file = next((f for f in held if f.is_file()), None)
    if file is None:
        raise MergeidError(
            f"{folder} has {ADAPTER_CONFIG} and no {held[0].name}; expected the adapter's weights beside its config: "
            "copy or download it again"
        )
    return laid_on(opened, open_checkpoint(str(file), allow_pickle=allow_pickle), told)


def _another(trained: str, named: Checkpoint) -> bool:
    """Whether the base that an adapter names is known to be another than the one that the user names: both are hub ids,
    or the former lies here too with other tensors, or other numbers at their beginning."""
    import torch

    place = _home(trained)
    if not os.path.isdir(place):
        both_hub = _is_hub_id(trained) and _is_hub_id(named.source) and not os.path.exists(_home(named.source))
        return both_hub and trained.split("@")[0] != named.source.split("@")[0]
    if os.path.exists(named.path) and os.path.samefile(place, named.path):
        return False
    try:
        other = open_checkpoint(place)
    except MergeidError:  # whatever lies there now
        return False
    if other.table != named.table:
        return True
    return not all(torch.equal(*(c.tensor(n).flatten()[:16] for c in (other, named))) for n in other.table)


def _holds_model(folder: Path) -> bool:
    """Whether a folder with an adapter's config holds a whole model too: its config, and weights that are not the
    adapter's. Trainers leave the base's config beside an adapter."""
    names = [p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith("adapter_model.")]
    return "config.json" in names and any(map(is_weights, names))


def _open_file(path: Path, allow_pickle: bool) -> Checkpoint:
    config = path.parent / "config.json"
    parsed = _config(config) if config.exists() else None
    if path.name.endswith(".index.json"):
        raise MergeidError(f"{path} is the index of a sharded checkpoint; name its folder instead: {path.parent}")
    if path.name.endswith(PICKLES) and path.stat().st_size:
        if not allow_pickle:
            raise MergeidError(pickle_refused(f"{path} is"))
        return _open_pickles(path, [path], parsed)
    return replace(_from_headers(path, {path: read_header(path)}), config=parsed)


def _config(path: Path) -> dict[str, Any]:
    return read_table(path, "the model's config.json")


def _open_folder(folder: Path, allow_pickle: bool) -> Checkpoint:
    found = contents_of(folder)
    if found is None:
        return _open_network(folder, allow_pickle)
    if found.folders == ("",):
        return replace(_open_network(folder, allow_pickle), config=found.config)
    return together(folder, found, lambda part: _open_network(part, allow_pickle))


def _open_network(folder: Path, allow_pickle: bool) -> Checkpoint:
    """The weights that lie directly in a folder."""
    names = [p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
    weights = find_weights(names, folder, allow_pickle=allow_pickle)
    config = _config(folder / "config.json") if (folder / "config.json").exists() else None
    shards: list[str]
    weight_map: dict[str, str] = {}
    metadata: dict[str, Any] = {}
    if weights.listing is not None:
        weight_map, metadata = read_index(folder / weights.listing)
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            if not (folder / shard).is_file():
                raise MergeidError(
                    f"{folder / weights.listing} lists the shard {shard}, which is missing; copy or download it again"
                )
    else:
        shards = [weights.name]
    if weights.pickled:
        return _open_pickles(folder, [folder / s for s in shards], config, weight_map)
    found = _from_headers(folder, {folder / s: read_header(folder / s) for s in shards}, weight_map)
    return replace(found, config=config, is_folder=True, index=weights.listing, index_metadata=metadata)


def _from_headers(
    path: Path, headers: Mapping[Path, Header], weight_map: Mapping[str, str] | None = None
) -> Checkpoint:
    """Put the headers of all shards together; the index decides where a name occurs twice."""
    table: dict[str, TensorInfo] = {}
    file_of: dict[str, Path] = {}
    spans: dict[str, tuple[int, int]] = {}
    placed = weight_map or {}
    for file, header in headers.items():
        for name, info in header.tensors.items():
            if name in placed and placed[name] != file.name:
                continue
            if name in table:
                raise MergeidError(f"tensor {name!r} is in both {file_of[name]} and {file}; expected it once")
            table[name], file_of[name], spans[name] = info, file, header.spans[name]
    _check_complete(path, placed, table)
    if not table:
        raise MergeidError(f"{path} contains no tensors; expected the weights of a model")
    return Checkpoint(
        source=os.fspath(path),
        path=path,
        files=tuple(headers),
        table=table,
        file_of=file_of,
        metadata={k: v for header in headers.values() for k, v in header.metadata.items()},
        file_metadata={file: header.metadata for file, header in headers.items()},
        _spans=spans,
    )


def _check_complete(path: Path, placed: Mapping[str, str], held: Container[str]) -> None:
    """Raises `MergeidError` where the index places a tensor that no shard holds."""
    for name, shard in placed.items():
        if name not in held:
            raise MergeidError(
                f"{path} is incomplete: the index places tensor {name!r} in {shard}, which lacks it; "
                "copy or download it again"
            )


def _open_pickles(
    path: Path, files: list[Path], config: dict[str, Any] | None, weight_map: Mapping[str, str] | None = None
) -> Checkpoint:
    from mergeid.io.pickled import load_pickle

    tensors: dict[str, Tensor] = {}
    placed = weight_map or {}
    for file in files:
        held = load_pickle(file).items()
        tensors.update({name: tensor for name, tensor in held if placed.get(name, file.name) == file.name})
    _check_complete(path, placed, tensors)
    found = Checkpoint.from_tensors(
        tensors, source=os.fspath(path), path=path, config=config, is_folder=len(files) > 1 or path.is_dir()
    )
    found.files = tuple(files)
    return found
