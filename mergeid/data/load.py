"""From what the user names to a dataset that fits the model."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from mergeid.basics.reading import check_regular
from mergeid.data import arrays, conform, images, text
from mergeid.data.batching import SHUFFLED, Item, ItemDataset, drawn, told, unloaded
from mergeid.data.chat import chat_name
from mergeid.errors import MergeidError
from mergeid.plugins import Adapter, Architecture

FUNCTION = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
HUB_NAME = re.compile(r"^[\w-][\w.-]*(/[\w-][\w.-]*)?(@(?P<split>\w+))?$")
TEXT_SUFFIXES = frozenset({".txt", ".md", ".text", ".rst", ".py", ".csv", ".tsv", ".log", ""})
SPLITS = ("validation", "test", "train")
Draw = tuple[int | None, int]
"""How many examples are taken at most, and the seed."""


def load_data(
    spec: Any,
    *,
    adapter: Adapter,
    arch: Architecture,
    folder: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    image_size: int | None = None,
    max_length: int | None = None,
) -> ItemDataset:
    """The data that `spec` names, as a map-style dataset of items that `collate` turns into batches.

    Args:
        spec: an image folder (class sub-folders, or flat and unlabelled), a text file, a ``.jsonl``/``.json`` file of
            ``{"text": …, "label": …}``, a ``.csv``/``.tsv`` file whose first line names such columns, a
            ``.safetensors`` or ``.npz`` file with inputs and labels, ``module:function`` that returns any of the
            objects below, a Hugging Face dataset's name (``org/name`` or ``org/name@split``); or an object: a torch
            dataset, a dict of tensors, a list of examples, an ``(inputs, labels)`` pair of tensors.
        adapter, arch: the model's adapter and architecture; they say what an input looks like.
        folder: the checkpoint's folder, whose tokenizer and preprocessor files are used.
        limit: at most so many examples, drawn without replacement.
        seed: of that draw, and of the masks of masked language models.
        image_size: height and width of images instead of the model's own; only for models that take that size.
        max_length: longest text in tokens instead of the adapter's default.

    Raises `MergeidError` where the data is not found, is empty or does not fit the model.
    """
    if limit is not None and limit < 1:
        raise MergeidError(f"the number of examples must be at least 1, got {limit}")
    about = conform.facts(adapter, arch, folder)
    if image_size is not None:
        if about.get("kind") != "image":
            raise MergeidError(f"{arch.id} takes no images; leave out --image-size")
        about["size"] = (about["size"][0], image_size, image_size)
    if max_length is not None and about.get("kind") == "text":
        longest = about.get("position_limit")
        about["max_length"] = min(max_length, longest) if longest else max_length
    dataset = _open(spec, about, folder, (limit, seed))
    conform.check(dataset, adapter, arch, about)
    dataset = dataset.watched(lambda item: conform.check_item(item, about))
    if limit is not None and limit < len(dataset):
        dataset = dataset.subset(drawn(len(dataset), limit, seed))
    return dataset


def _open(spec: Any, about: Mapping[str, Any], folder: Path | None, draw: Draw) -> ItemDataset:
    seed = draw[1]
    if isinstance(spec, (str, os.PathLike)):
        if not os.fspath(spec).strip():
            raise MergeidError("the data has an empty name; leave the option out, or name a file or folder")
        try:
            path = Path(spec).expanduser()
            is_folder, is_file = path.is_dir(), path.is_file()
        except (OSError, RuntimeError) as error:  # a name too long, a folder without permission, nobody's home
            raise MergeidError(f"the data {spec} cannot be read ({told(error)}); check the name") from error
        try:
            if is_folder:
                return _folder(path, about, folder, seed)
            if is_file:
                return _file(path, about, folder, seed)
        except OSError as error:
            where = error.filename or path
            raise MergeidError(
                f"the data {where} cannot be read ({error.strerror or told(error)}); check its permissions"
            ) from error
        if os.path.lexists(path):
            check_regular(path, "a file or folder of examples")
        return _named(str(spec), about, folder, draw)
    return _object(spec, about, folder, draw, type(spec).__name__)


def _folder(path: Path, about: Mapping[str, Any], folder: Path | None, seed: int) -> ItemDataset:
    if about.get("kind") == "image":
        return images.image_folder(path, about)
    if about.get("kind") == "text":
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in (".txt", ".md", ".text"))
        if not files:
            raise MergeidError(f"the folder {path} contains no text files (.txt, .md); give a text, jsonl or .npz file")
        return text.text_file(files, about, folder, seed, str(path))
    raise MergeidError(
        f"the model takes {about['input']!r}, which a folder cannot give; give a .safetensors or .npz file with it"
    )


def _file(path: Path, about: Mapping[str, Any], folder: Path | None, seed: int) -> ItemDataset:
    suffix = path.suffix.lower()
    if suffix in (".safetensors", ".npz"):
        return arrays.tensor_dataset(arrays.read_arrays(path), about, str(path))
    if about.get("kind") == "text":
        if suffix in (".jsonl", ".json"):
            return text.record_dataset(text.read_records(path), about, folder, seed, str(path))
        if suffix in text.COLUMNS and (rows := text.read_columns(path, text.COLUMNS[suffix])) is not None:
            return text.record_dataset(rows, about, folder, seed, str(path))
        if suffix in TEXT_SUFFIXES:
            return text.text_file([path], about, folder, seed, str(path))
    wanted = {"image": "an image folder", "text": "a text or jsonl file"}.get(str(about.get("kind")))
    raise MergeidError(
        f"{path} is not data that this model can take (input {about['input']!r}); expected "
        + (f"{wanted}, " if wanted else "")
        + "or a .safetensors or .npz file with inputs and labels"
    )


def _named(spec: str, about: Mapping[str, Any], folder: Path | None, draw: Draw) -> ItemDataset:
    if FUNCTION.match(spec):
        return _object(_call(spec), about, folder, draw, spec)
    match = HUB_NAME.match(spec)
    if match is None or (Path(spec).suffix and "/" not in spec) or spec.startswith((".", "/", "~")):
        raise MergeidError(
            f"the data {spec} does not exist; give a file, a folder, module:function or a Hugging Face dataset's name"
        )
    return _hub(spec.partition("@")[0], match["split"], about, folder, draw)


def _call(spec: str) -> Any:
    """What ``module:function`` returns; modules in the working directory are found too."""
    module_name, _, function = spec.partition(":")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise MergeidError(
            f"the data {spec}: module {module_name!r} cannot be imported ({error}); it must be in the working "
            f"directory or be installed"
        ) from error
    except (Exception, SystemExit) as error:  # the module is the user's, and may do anything while it is imported
        raise MergeidError(
            f"the data {spec}: module {module_name!r} fails on import ({told(error)}); repair it"
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    make = getattr(module, function, None)
    if not callable(make):
        raise MergeidError(f"the data {spec}: module {module_name!r} has no function {function!r}")
    try:
        return make()
    except (Exception, SystemExit) as error:  # the user's own code
        raise MergeidError(
            f"the data {spec}: the function {function!r} fails ({told(error)}); expected one that takes no arguments "
            f"and returns a dataset"
        ) from error


def _hub(name: str, split: str | None, about: Mapping[str, Any], folder: Path | None, draw: Draw) -> ItemDataset:
    try:
        import datasets
    except ImportError as error:
        raise MergeidError(
            f"the data {name} is not a file or folder here, and reading it as a Hugging Face dataset needs the package "
            "'datasets'; check the path or run `pip install datasets`"
        ) from error
    try:
        loaded = datasets.load_dataset(name) if split is None else datasets.load_dataset(name, split=split)
    except Exception as error:  # network, cache, format and permission errors of several libraries
        raise MergeidError(
            f"the Hugging Face dataset {name} cannot be loaded ({told(error)}); check name and split"
        ) from error
    if split is None and isinstance(loaded, Mapping):
        split = next((s for s in SPLITS if s in loaded), next(iter(loaded), None))
        loaded = loaded[split]
    return _rows(loaded, about, folder, draw, f"{name}@{split}")


def _object(data: Any, about: Mapping[str, Any], folder: Path | None, draw: Draw, source: str) -> ItemDataset:
    data = unloaded(data)
    if isinstance(data, ItemDataset):
        return data
    if isinstance(data, Mapping):
        return arrays.tensor_dataset(data, about, source)
    if isinstance(data, Tensor):
        return arrays.tensor_dataset({about["input"]: data}, about, source)
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(t, Tensor) for t in data):
        return arrays.tensor_dataset({about["input"]: data[0], "labels": data[1]}, about, source)
    if isinstance(data, (str, bytes)) or not (isinstance(data, Iterable) or hasattr(data, "__getitem__")):
        raise MergeidError(
            f"the data {source} is a {type(data).__name__}; expected a torch dataset, a dict of tensors or a list"
        )
    try:
        if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
            data = arrays.gathered(data, source)
        return _rows(data, about, folder, draw, source)
    except MergeidError:
        raise
    except Exception as error:  # the data set is the user's own code
        raise MergeidError(f"the data {source} cannot be read ({told(error)}); expected a list of examples") from error


def _rows(rows: Any, about: Mapping[str, Any], folder: Path | None, draw: Draw, source: str) -> ItemDataset:
    """A sequence of examples: strings and records of text, images with labels, or ready inputs."""
    limit, seed = draw
    if limit is not None and limit < len(rows) > SHUFFLED:  # before all texts are read
        rows = Subset(rows, drawn(len(rows), limit, seed))
    first = rows[0] if len(rows) else None
    if about.get("kind") == "text" and isinstance(first, str):
        return text.record_dataset([{"text": r} for r in rows], about, folder, seed, source)
    if about.get("kind") == "text" and isinstance(first, Mapping):
        column = next((n for n in text.TEXT_NAMES if n in first), None)
        if column is not None and isinstance(first[column], str):
            return text.record_dataset([dict(r) for r in rows], about, folder, seed, source)
        if chat_name([first]) is not None:
            return text.record_dataset([dict(r) for r in rows], about, folder, seed, source)
    if about.get("kind") == "image" and isinstance(first, Mapping):
        column = next((k for k, v in first.items() if hasattr(v, "convert") and hasattr(v, "size")), None)
        if column is not None:
            return _picture_rows(rows, column, about, source)
    return arrays.object_dataset(rows, about, source)


def _picture_rows(rows: Any, column: str, about: Mapping[str, Any], source: str) -> ItemDataset:
    """Records with a PIL image and a label, as Hugging Face's image datasets give them."""
    label = next((n for n in arrays.LABEL_NAMES if n in rows[0]), None)

    def get(index: int) -> Item:
        row = rows[index]
        item = Item({about["input"]: images.prepare(row[column], about)})
        if label is not None:
            item["labels"] = torch.tensor(int(row[label]))
        return item

    return ItemDataset(len(rows), get, source=source)
