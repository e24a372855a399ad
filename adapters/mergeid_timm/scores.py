"""Class scores and the labels that belong to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergeid.plugins import MergeidError

if TYPE_CHECKING:
    from torch import Tensor


def task(output: Any) -> Tensor:
    """One output of what a model returned: heads side by side."""
    import torch

    several = isinstance(output, (tuple, list))
    return torch.cat([o.flatten(1) for o in output], dim=1) if several else output


def check_labels(model: str, labels: Tensor, examples: int, classes: int) -> None:
    """Raises `MergeidError` unless labels are one class number per example."""
    if labels.dim() != 1 or labels.shape[0] != examples or labels.is_floating_point():
        raise MergeidError(
            f"{model} needs one class number per image, but the labels are {str(labels.dtype).removeprefix('torch.')} "
            f"{list(labels.shape)} for {examples} images; give one whole number for each"
        )
    low, high = (int(labels.min()), int(labels.max())) if labels.numel() else (0, 0)
    if low < 0 or high >= classes:
        raise MergeidError(
            f"label {low if low < 0 else high} in the data is out of range: {model} has {classes} classes, so labels "
            f"go from 0 to {classes - 1}"
        )
