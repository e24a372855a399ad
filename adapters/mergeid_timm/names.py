"""Tensor names of a built model against those of a checkpoint, and facts that need timm itself."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergeid.plugins import TensorTable
from mergeid_timm.index import COMPUTED, bare_names
from mergeid_timm.shapes import counted

if TYPE_CHECKING:
    from torch import nn

DATA_FACTS = frozenset({"input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "label_names"})
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def installed(name: str) -> bool:
    """Whether the installed timm has an architecture of that name (newer ones are not in the index)."""
    import timm

    return bool(timm.is_model(name))


def data_facts(name: str, tag: str, stated: Mapping[str, Any] | None) -> dict[str, Any]:
    """Preprocessing from a config.json where given, else from timm's record of the architecture (and tag)."""
    if stated is None or not {"input_size", "mean", "std", "interpolation", "crop_pct"} <= set(stated):
        import timm

        config = (timm.get_pretrained_cfg(f"{name}.{tag}", allow_unregistered=True) if tag else None) or (
            timm.get_pretrained_cfg(name, allow_unregistered=True)
        )
        stated = {**(config.to_dict() if config is not None else {}), **(stated or {})}
    return {
        "size": tuple(stated.get("input_size") or (3, 224, 224)),
        "mean": tuple(stated.get("mean") or IMAGENET_MEAN),
        "std": tuple(stated.get("std") or IMAGENET_STD),
        "interpolation": str(stated.get("interpolation") or "bicubic"),
        "crop_pct": float(stated.get("crop_pct") or 0.875),
    }


def needed(name: str) -> bool:
    """Whether a tensor says something: neither a step counter nor a buffer that the present timm computes."""
    return counted(name) and not name.endswith(COMPUTED)


def tensor_names(name: str, model: nn.Module, table: TensorTable) -> dict[str, str]:
    """Checkpoint name -> model key: bare names, and where these do not all fit, as timm's own filter renames them.

    A tensor that the filter reshapes or resamples has no single counterpart and is left out.
    """
    keys = set(model.state_dict())
    bare = bare_names(table)
    found = {n: b for n, b in bare.items() if b in keys}
    if not any(needed(b) for n, b in bare.items() if n not in found):
        return found
    renamed = _as_timm_renames(name, model, table, bare)
    return renamed if len(renamed) > len(found) else found


def _as_timm_renames(name: str, model: nn.Module, table: TensorTable, bare: Mapping[str, str]) -> dict[str, str]:
    """Follow each tensor, as an empty stand-in, through timm's ``checkpoint_filter_fn`` for this architecture."""
    import torch

    rename = getattr(sys.modules.get(type(model).__module__), "checkpoint_filter_fn", None)
    if rename is None:
        return {}
    stand_ins = {b: torch.empty(table[n].shape, device="meta") for n, b in bare.items()}
    origin = {id(t): n for (n, b), t in zip(bare.items(), stand_ins.values(), strict=True)}
    try:
        result = rename(dict(stand_ins), model)
    except Exception:  # filters are written for particular files and fail in their own ways on others
        return {}
    keys = set(model.state_dict())
    return {origin[id(t)]: k for k, t in result.items() if k in keys and id(t) in origin}


def first_mismatch(model: nn.Module, mapped: Mapping[str, str], table: TensorTable) -> str | None:
    """The first tensor in which model and checkpoint differ, in words."""
    state = model.state_dict()
    of_key = {k: n for n, k in mapped.items()}
    for key, tensor in state.items():
        if not counted(key):
            continue
        if key not in of_key:
            return f"tensor {key!r} {list(tensor.shape)} is missing from the checkpoint"
        shape = tuple(table[of_key[key]].shape)
        if shape != tuple(tensor.shape):
            return f"tensor {of_key[key]!r} has shape {list(shape)}, expected {list(tensor.shape)}"
    extra = next((n for n, b in bare_names(table).items() if n not in mapped and needed(b)), None)
    return None if extra is None else f"tensor {extra!r} of the checkpoint is not part of the model"


def class_count(model: Any, mapped: Mapping[str, str], table: TensorTable) -> int | None:
    """Number of classes in a checkpoint whose head has another size than the model's, None where it cannot be read."""
    classes = getattr(model, "num_classes", None)
    for name, key in mapped.items():
        shape = tuple(model.state_dict()[key].shape)
        other = tuple(table[name].shape)
        if shape != other and len(shape) == len(other) == 1 and shape[0] == classes:
            return other[0]
    return None


def config_with_classes(config: Mapping[str, Any], classes: int, labels: Sequence[str] | None) -> dict[str, Any]:
    """A hub config.json of a network with so many classes; descriptions of labels that it no longer has are left
    out."""
    found = {**config, "num_classes": classes}
    for part in ("pretrained_cfg", "model_args"):
        if isinstance(config.get(part), Mapping) and "num_classes" in config[part]:
            found[part] = {**config[part], "num_classes": classes}
    found.pop("label_names", None)
    described = found.pop("label_descriptions", None)
    if labels is not None:
        found["label_names"] = list(labels)
        if isinstance(described, Mapping):
            found["label_descriptions"] = {k: v for k, v in described.items() if k in labels}
    return found
