"""transformers' model types for the coverage table: a task model of each, from a shrunken configuration.

``TYPE`` runs scaled-dot-product attention where the type has it; ``TYPE:eager`` is the same model with the attention
written out.
"""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path
from typing import Any

from coverage_check import Batch, Case
from mergeid.plugins import Architecture, MergeidError, get_adapter

EAGER = ":eager"
# Task heads with logits come before base models.
ORDER = (
    *("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ"),
    *("CTC", "RNNT", "TDT", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION"),
    *("OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION", "INSTANCE_SEGMENTATION", "SEMANTIC_SEGMENTATION"),
    *("DEPTH_ESTIMATION", "ZERO_SHOT_OBJECT_DETECTION", "ZERO_SHOT_IMAGE_CLASSIFICATION", "MASK_GENERATION"),
    *("VISUAL_QUESTION_ANSWERING", "DOCUMENT_QUESTION_ANSWERING", "TABLE_QUESTION_ANSWERING", "KEYPOINT_MATCHING"),
    *("KEYPOINT_DETECTION", "POSE_ESTIMATION", "TEXT_RECOGNITION", "TABLE_RECOGNITION", "IMAGE_TO_IMAGE"),
    *("IMAGE_MATTING", "NORMAL_ESTIMATION", "POINTMAP_ESTIMATION", "TIME_SERIES_PREDICTION", "RETRIEVAL"),
    *("TEXT_TO_WAVEFORM", "TEXT_TO_SPECTROGRAM", "IMAGE_SEGMENTATION", "DECISION", "SEQUENCE_CLASSIFICATION"),
    *("TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "MULTIPLE_CHOICE", "PRETRAINING"),
)


def names() -> list[str]:
    from mergeid_transformers.configs import model_types

    types = model_types()
    return sorted([*types, *(t + EAGER for t in types if _source(t).count("_supports_sdpa = True"))])


@cache
def _source(model_type: str) -> str:
    """The type's modeling file, unread by Python (importing all of them takes minutes)."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    file = Path(inspect.getfile(CONFIG_MAPPING[model_type]))
    file = file.with_name(file.name.replace("configuration_", "modeling_"))
    return file.read_text() if file.exists() else ""


def families() -> dict[str, str]:
    """Name -> folder of transformers that defines the type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return {n: CONFIG_MAPPING[n.removesuffix(EAGER)].__module__.split(".")[-2] for n in names()}


def task_class(model_type: str) -> str:
    """The class to check: with a head that gives logits where the type has one."""
    from mergeid_transformers.configs import choose_class, classes_of, model_class
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    for task in ORDER:
        for found in classes_of(model_type, f"MODEL_FOR_{task}_MAPPING_NAMES"):
            if model_class(model_type, found).config_class is kind:
                return found
    return choose_class(model_type, None, frozenset())


def make(name: str) -> Case:
    import torch
    from mergeid_transformers.configs import library_config
    from mergeid_transformers.shrink import shrunken

    adapter: Any = get_adapter("transformers")
    model_type = name.removesuffix(EAGER)
    config = shrunken(library_config(model_type, OVERRIDES.get(model_type))).to_dict()
    if name.endswith(EAGER):
        config["attn_implementation"] = "eager"
    arch = Architecture("transformers", model_type, {"config": config, "model_class": task_class(model_type)})
    torch.manual_seed(0)
    model = adapter.build(arch)

    def another(generator: torch.Generator, batch_size: int) -> Batch:
        batch = adapter.example_inputs(arch, model, generator, batch_size)
        batch.pop("labels", None)
        return batch

    return Case(model, another(torch.Generator().manual_seed(0), 2), adapter.forward, another, type(model).__name__)


OVERRIDES: dict[str, dict[str, Any]] = {}
