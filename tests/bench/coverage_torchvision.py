"""torchvision's models for the coverage table: all 98 that `torchvision.models.list_models` knows of for classification
(80), detection (12) and segmentation (6); not the quantised ones and those for video and optical flow.

All build without weights. What is compared:

- classification: the class logits; GoogLeNet and Inception also those of their auxiliary heads.
- segmentation: the class logits of every pixel.
- detection: class logits and box regressions of every head as they come out of it, before decoding, sorting and
  non-maximum suppression: which boxes survive these is no continuous function of the weights. The heads for regions see
  the proposals that the network itself selects, and masks and keypoints are read for the four best boxes.
"""

from __future__ import annotations

from typing import Any

import torch
from coverage_check import Batch, Case
from torch import Tensor, nn
from torchvision import models

IMAGES = {
    **{"alexnet": 64, "squeezenet": 64, "googlenet": 64, "maxvit": 224, "swin": 112, "inception": 299},
    **{"vit_b_16": 32, "vit_l_16": 32, "vit_b_32": 64, "vit_l_32": 64, "vit_h_14": 28},
}
"""Image sizes by the beginning of a name; other classifiers run at 32, segmentation and detection at 64."""
HEADS = ("rpn.head", "roi_heads.box_predictor", "roi_heads.mask_predictor", "roi_heads.keypoint_predictor", "head")
REGIONS = {"rpn_pre_nms_top_n_test": 30, "rpn_post_nms_top_n_test": 12, "box_score_thresh": 0.0}
LAYERS = {"vit_l_16": 6, "vit_l_32": 6, "vit_h_14": 6}
"""Models of which only so many layers are checked: a copy of the whole in float64 takes more than 4 GB."""


def _kind(name: str) -> str:
    for kind in ("detection", "segmentation"):
        if name in models.list_models(module=getattr(models, kind)):
            return kind
    return "classification"


def names() -> list[str]:
    """Small models first within a task, so that a table that grows says most soonest; detectors, the slowest, last."""

    def parameters(name: str) -> int:
        return int(models.get_model_weights(name).DEFAULT.meta["num_params"])

    parts = (models, models.segmentation, models.detection)
    return [name for module in parts for name in sorted(models.list_models(module=module), key=parameters)]


def families() -> dict[str, str]:
    """Name -> the kind of task and the module that defines it."""
    where = {n: models.get_model_builder(n).__module__.rpartition(".")[2] for n in names()}
    return {n: f"{_kind(n)}.{where[n]}" for n in names()}


def make(name: str) -> Case:
    torch.manual_seed(0)
    kind, size = _kind(name), _image(name)
    options: dict[str, Any] = {} if kind == "classification" else {"weights_backbone": None}
    note = f"images of {size}"
    if name.startswith("vit_"):
        options["image_size"] = size
    elif name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # a slow initialisation that says nothing about structure
    elif "rcnn" in name:
        options |= {"min_size": size, "max_size": size, "box_detections_per_img": 4, **REGIONS}
    elif kind == "detection" and not name.startswith("ssd"):
        options |= {"min_size": size, "max_size": size}
    model = models.get_model(name, weights=None, **options).eval()
    if name in LAYERS:
        model.encoder.layers = model.encoder.layers[: LAYERS[name]]
        note += f", checked with {LAYERS[name]} layers"
    elif name == "regnet_y_128gf":
        for stage in model.trunk_output:
            del stage[1:]
        note += ", checked with one block in every stage"

    def another(generator: torch.Generator, batch_size: int) -> Batch:
        return {"images": torch.rand(batch_size, 3, size, size, generator=generator)}

    forward = _heads if kind == "detection" else _logits
    return Case(model, another(torch.Generator().manual_seed(0), 2), forward, another, note)


def _image(name: str) -> int:
    default = 32 if _kind(name) == "classification" else 64
    return next((size for start, size in IMAGES.items() if name.startswith(start)), default)


def _logits(model: nn.Module, batch: Batch) -> Any:
    if not isinstance(model, (models.GoogLeNet, models.Inception3)):
        return model(batch["images"])
    model.training = True  # of the whole alone, not of its layers: the auxiliary heads run
    try:
        return model(batch["images"])
    finally:
        model.training = False


def _heads(model: nn.Module, batch: Batch) -> list[Any]:
    """What every head says, while the whole detector runs."""
    seen: list[Any] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output)

    parts = dict(model.named_modules())
    handles = [parts[h].register_forward_hook(keep) for h in HEADS if h in parts]
    try:
        images: list[Tensor] = list(batch["images"])
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return seen
