"""How raw text, images and sound become batches, from a checkpoint's small files and its config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid.plugins import Architecture, Batch, MergeidError
from mergeid_transformers.files import read_json
from mergeid_transformers.tasks import EXAMPLE_TASKS, IGNORED

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_INPUTS = frozenset({"pixel_values"})
DEFAULT_MAX_LENGTH = 128
PIL_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def _config(arch: Architecture) -> Any:
    from mergeid_transformers.configs import library_config

    return library_config(arch.name, arch.options.get("config"))


def _main_input(arch: Architecture) -> str:
    from mergeid_transformers.configs import model_class

    return str(getattr(model_class(arch.name, str(arch.options["model_class"])), "main_input_name", "input_ids"))


def preprocessing(arch: Architecture, task: str, folder: Path | None) -> dict[str, Any]:
    """``{"kind": "text", "input": "input_ids", "task", "max_length", "vocab_size", "pad_id", …}``,
    ``{"kind": "image", "input": "pixel_values", "size": (C, H, W), "mean", "std", "interpolation", …}`` or
    ``{"kind": "other", "input": name}``; ``classes`` where labels are classes."""
    config = _config(arch)
    name = _main_input(arch)
    if name == "input_ids":
        found = _text(config, task)
    elif name in IMAGE_INPUTS:
        found = _image(config, folder)
    else:
        found = {"kind": "other"}
    found |= {"input": name, "task": task}
    classes = int(getattr(config, "num_labels", 0) or 0)
    if task in (EXAMPLE_TASKS | {"token"}) - {"choice"} and classes > 1:
        found["classes"] = classes
        found["class_names"] = {str(v): k for k, v in config.id2label.items() if v != f"LABEL_{k}"}
    return found


def _text(config: Any, task: str) -> dict[str, Any]:
    from mergeid_transformers.configs import text_config
    from mergeid_transformers.inputs import position_limit, vocabulary

    text = text_config(config)
    limit = position_limit(config)
    start = getattr(config, "decoder_start_token_id", None)
    pad = getattr(text, "pad_token_id", None)
    return {
        "kind": "text",
        "vocab_size": vocabulary(config),
        "max_length": min(limit or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH),
        "position_limit": limit,
        "pad_id": pad if isinstance(pad, int) and pad >= 0 else 0,
        "decoder_start_id": start if isinstance(start, int) else (pad or 0) if task == "seq2seq" else None,
    }


def _image(config: Any, folder: Path | None) -> dict[str, Any]:
    from mergeid_transformers.media import image_shape

    shape = image_shape(config)
    stated = (read_json(folder / "preprocessor_config.json") if folder is not None else None) or {}
    stated = stated.get("image_processor", stated) if isinstance(stated.get("image_processor"), Mapping) else stated
    wanted = stated.get("crop_size") or stated.get("size")
    side = _side(wanted)
    if side is not None and getattr(config, "image_size", None) is None:
        shape = (shape[0], *side)
    normalise = stated.get("do_normalize", True)
    return {
        "kind": "image",
        "size": shape,
        "mean": tuple(stated.get("image_mean") or (0.5,) * shape[0]) if normalise else (0.0,) * shape[0],
        "std": tuple(stated.get("image_std") or (0.5,) * shape[0]) if normalise else (1.0,) * shape[0],
        "interpolation": PIL_RESAMPLING.get(stated.get("resample", 2), "bilinear"),
        "crop_pct": 1.0,
    }


def _side(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping):
        if "height" in size and "width" in size:
            return int(size["height"]), int(size["width"])
        if "shortest_edge" in size:
            return int(size["shortest_edge"]), int(size["shortest_edge"])
    return None


def check(arch: Architecture, task: str, batch: Batch) -> None:
    """Raises `MergeidError` where values or shapes of a batch do not fit the model."""
    about = preprocessing(arch, task, None)
    model = f"{arch.id} ({arch.options['model_class']})"
    if about["input"] not in batch:
        given = ", ".join(k for k in batch if k != "labels") or "none"
        raise MergeidError(f"{model} needs the input {about['input']!r}, but the data has: {given}; rename one of them")
    x: Tensor = batch[about["input"]]
    if about["kind"] == "text":
        _check_text(model, task, x, about)
    elif about["kind"] == "image" and (x.dim() < 4 or x.shape[-3] != about["size"][0]):
        raise MergeidError(
            f"{model} takes images [batch, {', '.join(map(str, about['size']))}], but the data has shape "
            f"{list(x.shape)}; give images with {about['size'][0]} channel(s)"
        )
    if "classes" in about and isinstance(batch.get("labels"), type(x)):
        valid = batch["labels"][batch["labels"] != IGNORED]
        if valid.numel() and (int(valid.min()) < 0 or int(valid.max()) >= about["classes"]):
            wrong = int(valid.min()) if int(valid.min()) < 0 else int(valid.max())
            raise MergeidError(
                f"label {wrong} in the data is out of range: {model} has {about['classes']} classes, so labels go "
                f"from 0 to {about['classes'] - 1}"
            )


def _check_text(model: str, task: str, ids: Tensor, about: Mapping[str, Any]) -> None:
    if ids.dim() != (3 if task == "choice" else 2) or ids.is_floating_point():
        shape = "[batch, choices, tokens]" if task == "choice" else "[batch, tokens]"
        raise MergeidError(
            f"{model} takes token ids as integers {shape}, but the data has {str(ids.dtype).removeprefix('torch.')} "
            f"{list(ids.shape)}; give such ids"
        )
    low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (0, 0)
    if low < 0 or high >= about["vocab_size"]:
        raise MergeidError(
            f"token id {low if low < 0 else high} in the data is out of range: {model} has a vocabulary of "
            f"{about['vocab_size']}; use the checkpoint's own tokenizer"
        )
    limit = about["position_limit"]
    if limit is not None and ids.shape[-1] > limit:
        raise MergeidError(
            f"the data has sequences of {ids.shape[-1]} tokens, but {model} has {limit} positions; shorten them"
        )
