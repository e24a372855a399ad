"""Data that is tensors already: ``.safetensors`` and ``.npz`` files, dicts of tensors, datasets of pairs."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergeid.basics.casting import holds_numbers
from mergeid.data.batching import IGNORED, Item, ItemDataset, told
from mergeid.data.images import normalise
from mergeid.data.targets import add_targets
from mergeid.errors import MergeidError, listed

INPUT_NAMES = ("x", "inputs", "input", "images", "image", "pixel_values", "input_ids", "input_values",
               "input_features", "data", "X")  # fmt: skip
LABEL_NAMES = ("labels", "label", "y", "targets", "target")
STREAMED = 1 << 16
"""Examples that are taken at most from an iterable without a length."""
STREAMED_BYTES = 1 << 32
_KINDS = {"U": "text", "S": "text", "O": "Python objects", "M": "dates", "m": "times", "V": "records"}
"""Kinds of NumPy arrays that hold no numbers."""


def read_arrays(path: Path) -> dict[str, Tensor]:
    """All arrays of a ``.safetensors`` or ``.npz`` file. Raises `MergeidError` where it cannot be read."""
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            return {name: as_tensor(name, value, str(path)) for name, value in load_file(path).items()}
        _refuse_bombs(path)
        with np.load(path, allow_pickle=False) as stored:
            return {name: as_tensor(name, stored[name], str(path)) for name in stored.files}
    except MergeidError:
        raise
    except Exception as error:  # safetensors, zipfile and NumPy each raise kinds of their own
        raise MergeidError(
            f"{path} cannot be read as {path.suffix} data ({told(error)}); write it again with arrays of inputs and "
            "labels"
        ) from error


def _refuse_bombs(path: Path) -> None:
    """A few MB may be packed zeros of many GB, which NumPy would unpack without asking."""
    with zipfile.ZipFile(path) as packed:
        size = sum(entry.file_size for entry in packed.infolist())
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else size
    if size > there // 2:
        raise MergeidError(
            f"{path} unpacks to {size / 2**30:,.0f} GB, more than half of this machine's memory; give fewer examples"
        )


def _from_numpy(array: Any) -> Tensor:
    """Also in the other byte order, which torch does not take."""
    found = np.ascontiguousarray(array)
    return torch.from_numpy(found.astype(found.dtype.newbyteorder("="), copy=False))


def _plain(tensor: Tensor) -> Tensor:
    """Integer formats with which torch cannot calculate, as int64. Raises `MergeidError` where that does not hold
    them, and for complex numbers."""
    if tensor.is_complex():
        raise MergeidError("its numbers are complex; expected real ones")
    if tensor.dtype not in (torch.uint16, torch.uint32, torch.uint64):
        return tensor
    wide = tensor.long()
    if tensor.dtype == torch.uint64 and bool((wide < 0).any()):
        raise MergeidError("it holds integers of 2^63 and more; expected smaller ones")
    return wide


def tensor_dataset(arrays: Mapping[str, Any], about: Mapping[str, Any], source: str) -> ItemDataset:
    """A dataset from arrays whose first dimension counts the examples.

    The input may have any of the usual names (`INPUT_NAMES`), labels too (`LABEL_NAMES`). Images as uint8 are scaled
    and normalised, floats are taken as they are; [N, H, W, C] and [N, H, W] are rearranged.

    Raises `MergeidError` where there is no input or the lengths differ.
    """
    named = rename(arrays, about, source)
    tensors = {k: as_tensor(k, v, source) for k, v in named.items()}
    sizes = {k: v.shape[0] if v.dim() else 0 for k, v in tensors.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{k} {n}" for k, n in sizes.items())
        raise MergeidError(f"the data {source} has arrays of different lengths ({told}); give one entry per example")
    if "labels" in tensors:
        tensors["labels"] = squeeze_labels(tensors["labels"], source)
    whole = about["input"]
    labels = tensors.get("labels")
    per_example = labels if labels is not None and labels.dim() == 1 else None
    if about.get("kind") == "image":
        tensors[whole] = channels_first(tensors[whole], about)

    def get(index: int) -> Item:
        return finish(Item({k: v[index] for k, v in tensors.items()}), about)

    return ItemDataset(next(iter(sizes.values()), 0), get, source=source, labels=per_example)


def rename(arrays: Mapping[str, Any], about: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Arrays under the names that the model and mergeid use: the input's keyword and ``"labels"``. Keys that an
    unknown module takes are left as they are."""
    wanted = about["input"]
    found = dict(arrays)
    if wanted not in found:
        name = next((n for n in INPUT_NAMES if n in found), None)
        if name is None and about.get("kind") is None:
            return found  # a live module: the keys are its own keywords
        if name is None:
            given = listed(found) or "nothing"
            raise MergeidError(
                f"the data {source} has no inputs: it holds {given}; expected one of {', '.join(INPUT_NAMES)}"
            )
        found = {(wanted if k == name else k): v for k, v in found.items()}
    if "labels" not in found:
        name = next((n for n in LABEL_NAMES if n in found), None)
        if name is not None:
            found["labels"] = found.pop(name)
    return found


def squeeze_labels(labels: Tensor, source: str) -> Tensor:
    """Labels as integers; a trailing dimension of 1 is dropped. Raises `MergeidError` for fractions."""
    if labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if holds_numbers(labels):
        if labels.is_complex() or not bool((labels == labels.round()).all() and labels.isfinite().all()):
            raise MergeidError(
                f"the data {source} has fractional, NaN or infinite labels; expected class numbers (integers)"
            )
        labels = labels.long()
    return labels.long()


def channels_first(images: Tensor, about: Mapping[str, Any]) -> Tensor:
    """[N, H, W] and [N, H, W, C] as [N, C, H, W], where the model's channel count says which is which."""
    channels = about["size"][0]
    if images.dim() == 3 and channels == 1:
        return images[:, None]
    if images.dim() == 4 and images.shape[1] != channels and images.shape[3] == channels:
        return images.permute(0, 3, 1, 2)
    return images


def finish(item: Item, about: Mapping[str, Any]) -> Item:
    """uint8 images normalised, float64 as float32, token ids as int64, targets of language models filled in.

    Raises `MergeidError` for an image of integers that are no bytes."""
    x = item.get(about["input"])
    if x is None:
        return item
    if about.get("kind") == "image" and not x.is_floating_point() and x.dtype != torch.uint8:
        x = _as_bytes(x)
    if about.get("kind") == "image" and x.dtype == torch.uint8 and x.dim() == 3:
        item[about["input"]] = normalise(x, about)
    elif x.dtype == torch.float64:
        item[about["input"]] = x.float()
    elif about.get("kind") == "text" and not x.is_floating_point():
        item[about["input"]] = x.long()
    if about.get("kind") == "text":
        item.pad_id = int(about.get("pad_id") or 0)
        add_targets(item, about, ignored=IGNORED)
    return item


def _as_bytes(image: Tensor) -> Tensor:
    low, high = (int(image.min()), int(image.max())) if image.numel() else (0, 0)
    if image.dtype == torch.bool or low < 0 or high > 255:
        what = "truth values" if image.dtype == torch.bool else f"integers from {low} to {high}"
        raise MergeidError(f"an image of the data holds {what}; expected integers from 0 to 255, or floats")
    return image.to(torch.uint8)


def object_dataset(data: Any, about: Mapping[str, Any], source: str) -> ItemDataset:
    """A torch dataset, a list or any iterable of examples: dicts, (input, label) pairs or bare inputs."""
    rows: Sequence[Any] = data if hasattr(data, "__len__") and hasattr(data, "__getitem__") else gathered(data, source)

    def get(index: int) -> Item:
        row = rows[index]
        if isinstance(row, Mapping):
            named = rename(row, about, source)
        elif isinstance(row, (tuple, list)) and len(row) == 2:
            named = {about["input"]: row[0], "labels": row[1]}
        else:
            named = {about["input"]: row}
        return finish(Item({k: as_tensor(k, v, source) for k, v in named.items()}), about)

    return ItemDataset(len(rows), get, source=source)


def as_tensor(name: str, value: Any, source: str) -> Tensor:
    """Raises `MergeidError` for what is no tensor and cannot be made one."""
    try:
        return _plain(_from_numpy(value) if isinstance(value, np.ndarray) else torch.as_tensor(value))
    except MergeidError as error:
        raise MergeidError(f"the data {source}, {name!r}: {error}") from error
    except Exception as error:  # TypeError, ValueError, RuntimeError, OverflowError, by the kind of value
        if isinstance(value, np.ndarray):  # which formats torch takes is of no help to whoever has text or dates
            told_of = f"{name!r} as an array of {_KINDS.get(value.dtype.kind, value.dtype.name)}"
        else:
            told_of = f"{name!r} of the kind {type(value).__name__}, which cannot become a tensor ({told(error)})"
        raise MergeidError(f"the data {source} has {told_of}; expected numbers") from error


def gathered(data: Iterable[Any], source: str) -> list[Any]:
    """The examples of an iterable without a length, which may have no end. Raises `MergeidError` for too many."""
    found: list[Any] = []
    size = 0
    for row in data:
        found.append(row)
        values = row.values() if isinstance(row, Mapping) else row if isinstance(row, (tuple, list)) else (row,)
        size += sum(getattr(v, "nbytes", 0) for v in values)
        if len(found) > STREAMED or size > STREAMED_BYTES:
            raise MergeidError(
                f"the data {source} gives more than {len(found) - 1:,} examples and has no length; expected a list, a "
                "dataset with __len__, or an iterable that ends sooner"
            )
    return found
