"""What a transformers class is trained for, its task output and its loss."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from mergeid.plugins import LossParts, MergeidError

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""Label of a position that is not scored (padding, prompts): the library's own convention."""

# Output fields in the order in which one is taken for "the task output".
OUTPUT_FIELDS = (
    "logits",
    "start_logits",
    "logits_per_image",
    "logits_per_text",
    "prediction_logits",
    "pred_masks",
    "reconstruction",
    "last_hidden_state",
    "image_embeds",
    "text_embeds",
    "embeddings",
    "feature_maps",
    "predicted_depth",
    "class_queries_logits",
    "spectrogram",
    "waveform",
    "audio_values",
    "alphas",
    "prediction_outputs",
    "mean_predictions",
    "full_predictions",
    "loc",
    "keypoints",
    "matching_scores",
    "text_features",
    "pooler_output",
    "audio_embeds",
    "encoder_last_hidden_state",
    "latents",
    "question_answering_score",
    "multimodal_embeddings",
    "waveforms",
    "logits_video_text",
    "logits_audio_text",
    "audio",
    "intermediate_hidden_states",
    "heatmaps",
    "last_hidden_states",
    "decoded_pixel_values",
    "decoder_class_logits",
)
# Heads that are judged together, laid behind each other along the last dimension (all further ones flat).
BESIDE = {
    "logits": ("pred_boxes",),
    "class_queries_logits": ("masks_queries_logits",),
    "pred_masks": ("iou_scores",),
    "text_features": ("image_features",),
    "decoder_class_logits": ("decoder_coord_logits",),
    "keypoints": ("scores", "descriptors", "matching_scores"),
}

# First match wins: several encoder-decoder classes are listed as causal models too.
_TASKS = (
    ("seq2seq", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    ("seq2seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
    ("causal", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    ("causal", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
    ("masked", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    ("sequence", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    ("token", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
    ("image", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    ("audio", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES"),
    ("choice", "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES"),
    ("question", "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"),
)
# Listed as causal, but their own loss is not shifted.
_UNSHIFTED = frozenset({"XLNetLMHeadModel", "XLMWithLMHeadModel", "FlaubertWithLMHeadModel"})
TOKEN_TASKS = frozenset({"seq2seq", "causal", "masked", "token"})
EXAMPLE_TASKS = frozenset({"sequence", "image", "audio", "choice"})


@cache
def _task_of_class(model_class: str) -> str:
    from transformers.models.auto import modeling_auto

    for task, mapping in _TASKS:
        for names in getattr(modeling_auto, mapping, {}).values():
            if model_class == names or (not isinstance(names, str) and model_class in names):
                return "masked" if model_class in _UNSHIFTED else task
    return "none"


def task_of(model_class: str, config: Mapping[str, Any]) -> str:
    """``"causal"``, ``"masked"``, ``"seq2seq"``, ``"sequence"``, ``"token"``, ``"image"``, ``"audio"``,
    ``"choice"``, ``"question"`` or ``"none"`` (an encoder without a head, contrastive models, …)."""
    task = _task_of_class(model_class)
    if task == "causal" and config.get("is_encoder_decoder"):
        return "seq2seq"
    return task


def class_count(config: Any) -> int:
    """Number of classes of a classification config (transformers' default is two)."""
    return int(getattr(config, "num_labels", 2))


def task_output(output: Any) -> Tensor:
    """The tensor that the model is judged by: logits where there is a head, else the hidden states.

    Start and end logits of question answering are stacked in a last dimension of 2. A base model with a pooler
    gives hidden states and pooled vector behind each other along the tokens, so that both count as outputs.
    """
    import torch

    if isinstance(output, (tuple, list)) and not hasattr(output, "keys"):
        found = [v for v in output if isinstance(v, torch.Tensor) and v.is_floating_point()]
        several = len(found) > 1 and all(v.dim() > 1 and len(v) == len(found[0]) for v in found)
        output = torch.cat([v.flatten(1) for v in found], dim=1) if several else next(iter(found), output)
    if isinstance(output, torch.Tensor):
        return output
    for field in OUTPUT_FIELDS:
        value = getattr(output, field, None)
        if value is None:
            continue
        if field == "start_logits" and getattr(output, "end_logits", None) is not None:
            return torch.stack((value, output.end_logits), dim=-1)
        if isinstance(value, (tuple, list)):
            value = value[-1]
        for other in BESIDE.get(field, ()):
            beside = getattr(output, other, None)
            if isinstance(beside, torch.Tensor):
                k = min(value.dim(), beside.dim()) - 1
                while value.shape[:k] != beside.shape[:k]:
                    k -= 1
                value = torch.cat((value.flatten(k), beside.flatten(k)), dim=-1)
        pooled = getattr(output, "pooler_output", None)
        if field == "last_hidden_state" and isinstance(pooled, torch.Tensor):
            if value.dim() == 3 and pooled.dim() == 2 and value.shape[-1] == pooled.shape[-1]:
                return torch.cat((value, pooled[:, None]), dim=1)
            return pooled
        return value
    fields = ", ".join(output.keys()) if hasattr(output, "keys") else type(output).__name__
    raise MergeidError(
        f"the model returns no output that mergeid can judge (it returns: {fields}); give one with a task head"
    )


def loss_parts(task: str, output: Tensor, labels: Tensor) -> LossParts:
    """Cross-entropy summed per example, with the library's conventions (shifted for causal models, `IGNORED`
    labels left out).

    Args:
        task: one of `TOKEN_TASKS` (output [B, T, N], labels [B, T]) or `EXAMPLE_TASKS` (output [B, N], labels
            [B]).

    Raises `MergeidError` where shapes or labels do not fit.
    """
    from torch.nn.functional import cross_entropy

    classes = output.shape[-1]
    if task == "causal":
        # A model that puts image tokens before the text returns more positions than there are labels.
        output = output[:, -labels.shape[1] :]
        output, labels = output[:, :-1], labels[:, 1:]
    expected = tuple(output.shape[:-1])
    if tuple(labels.shape) != expected:
        raise MergeidError(
            f"labels have shape {tuple(labels.shape)}, but the model's output {tuple(output.shape)} needs "
            f"{expected}; give one label per {'token' if task in TOKEN_TASKS else 'example'}"
        )
    scored = labels != IGNORED
    low, high = _range(labels, scored)
    if low < 0 or high >= classes:
        raise MergeidError(
            f"label {low if low < 0 else high} is out of range: the model's head has {classes} outputs, so labels "
            f"go from 0 to {classes - 1} ({IGNORED} is ignored)"
        )
    flat = cross_entropy(output.reshape(-1, classes), labels.reshape(-1).long(), ignore_index=IGNORED, reduction="none")
    right = (output.argmax(dim=-1) == labels) & scored
    n = labels.shape[0]
    return LossParts(flat.reshape(n, -1).sum(dim=1), right.reshape(n, -1).sum(dim=1), scored.reshape(n, -1).sum(dim=1))


def _range(labels: Tensor, scored: Tensor) -> tuple[int, int]:
    valid = labels[scored]
    return (int(valid.min()), int(valid.max())) if valid.numel() else (0, 0)
