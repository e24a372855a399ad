"""Does the data fit the model? Asked once when it is loaded, so that errors name the data and not a tensor op."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mergeid.data.batching import IGNORED, Item, ItemDataset, collate, told
from mergeid.errors import MergeidError, listed
from mergeid.plugins import Adapter, Architecture, Batch

INPUT_OF_KIND = {"image": "x", "text": "input_ids"}
POSITIONAL = "arg0"
"""Key of the only input of a live module that no adapter knows: it is passed by position."""

LOOKED_AT = 4
"""Examples that are made to check shapes; label ranges are checked on all where that costs nothing."""


def facts(adapter: Adapter, arch: Architecture, folder: Path | None) -> dict[str, Any]:
    """The adapter's preprocessing facts, from the checkpoint's own files where the adapter reads such."""
    ask: Any = adapter.preprocessing
    takes_folder = "folder" in inspect.signature(ask).parameters
    try:
        found = dict(ask(arch, folder=folder) if takes_folder else ask(arch))
    except MergeidError:
        raise
    except Exception as error:  # numbers that are texts, tables that are lists, in the files of another library
        raise MergeidError(
            f"the preprocessing of {folder or arch.id} cannot be read ({told(error)}); repair its "
            "preprocessor_config.json or config.json"
        ) from error
    found.setdefault("input", INPUT_OF_KIND.get(str(found.get("kind")), POSITIONAL))
    return found


def check(dataset: ItemDataset, adapter: Adapter, arch: Architecture, about: Mapping[str, Any]) -> None:
    """Raises `MergeidError`, naming the data's source, where examples or labels do not fit the model."""
    if len(dataset) == 0:
        raise MergeidError(f"the data {dataset.source} is empty; give at least one example")
    try:
        batch = collate([dataset[i] for i in range(min(LOOKED_AT, len(dataset)))])
        check_batch(batch, adapter, arch, about)
        if dataset.labels is not None and about.get("classes"):
            _check_classes(arch.id, dataset.labels, int(about["classes"]))
    except MergeidError as error:
        raise MergeidError(f"the data {dataset.source} does not fit: {error}") from error


def check_item(item: Item, about: Mapping[str, Any]) -> None:
    """Values that no shape shows. Raises `MergeidError` for NaN and infinite inputs, and token ids out of range."""
    for key, value in item.items():
        if not isinstance(value, torch.Tensor) or key == "labels":
            continue
        if not value.numel():
            if key == about["input"]:
                raise MergeidError(f"{key!r} is empty (shape {list(value.shape)})")
            continue
        if value.is_floating_point():
            if bool(value.isnan().any()) or (key == about["input"] and not bool(value.isfinite().all())):
                raise MergeidError(f"{key!r} contains NaN or infinite values; repair or remove them")
        elif key == about["input"] and about.get("vocab_size"):
            low, high = int(value.min()), int(value.max())
            if low < 0 or high >= about["vocab_size"]:
                raise MergeidError(
                    f"token id {low if low < 0 else high} is out of range: the model has a vocabulary of "
                    f"{about['vocab_size']}; use the checkpoint's own tokenizer"
                )


def check_batch(batch: Batch, adapter: Adapter, arch: Architecture, about: Mapping[str, Any]) -> None:
    """The adapter's own check where it has one, else shape and label range by its preprocessing facts."""
    own = getattr(adapter, "check", None)
    if own is not None:
        own(arch, batch)
        return
    if about.get("kind") is None:
        return
    x = batch.get(about["input"])
    if not isinstance(x, torch.Tensor):
        given = listed(k for k in batch if k != "labels") or "none"
        raise MergeidError(
            f"{arch.id} needs the input {about['input']!r}, but the data has: {given}; rename one of them"
        )
    if about.get("kind") == "image" and (x.dim() != 4 or x.shape[1] != about["size"][0]):
        raise MergeidError(
            f"{arch.id} takes images [batch, {', '.join(map(str, about['size']))}], but the data has shape "
            f"{list(x.shape)}; give images of that shape"
        )
    if about.get("vocab_size") and x.numel() and int(x.max()) >= about["vocab_size"]:
        raise MergeidError(f"token id {int(x.max())} is out of range: {arch.id} has {about['vocab_size']} tokens")
    if isinstance(batch.get("labels"), torch.Tensor) and about.get("classes"):
        _check_classes(arch.id, batch["labels"], int(about["classes"]))


def _check_classes(model: str, labels: torch.Tensor, classes: int) -> None:
    scored = labels[labels != IGNORED]
    if not scored.numel():
        return
    low, high = int(scored.min()), int(scored.max())
    if low < 0 or high >= classes:
        raise MergeidError(
            f"label {low if low < 0 else high} is out of range: {model} has {classes} classes, so labels go from 0 to "
            f"{classes - 1}"
        )
