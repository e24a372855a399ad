"""Small random inputs for any transformers class, made from its forward signature and its config."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from mergeid.plugins import Batch, MergeidError
from mergeid_transformers.configs import text_config, vision_config
from mergeid_transformers.tasks import EXAMPLE_TASKS, class_count

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# Sequence lengths to choose from: long enough to show what is per token, short enough to trace in no time.
LENGTHS = (11, 13, 17, 19, 23, 9, 10, 8)
IMAGE_TOKEN_FIELDS = ("image_token_id", "image_token_index")
DEFAULT_IMAGE_SIZE = 64
CHOICES = 2
# Their position tables (fairseq's) start counting after the padding index, which costs pad + 1 positions.
POSITIONS_AFTER_PADDING = frozenset(
    (
        *("camembert", "data2vec-text", "ernie_m", "esm", "ibert", "layoutlmv3", "lilt", "longformer"),
        *("luke", "markuplm", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
    )
)


def parameters_of(model: nn.Module) -> frozenset[str]:
    """Names of the arguments of a model's forward (``"kwargs"`` among them where any keyword is taken)."""
    kind: Any = type(model)
    return _parameters(kind)


@cache
def _parameters(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def sequence_length(config: Any, limit: int | None, avoid: frozenset[int]) -> int:
    """A length that fits the model and differs from its widths, so that no dimension is taken for another."""
    fitting = [n for n in LENGTHS if limit is None or n <= limit] or [limit or 1]
    return next((n for n in fitting if n not in avoid), fitting[0])


def position_limit(config: Any) -> int | None:
    """Longest sequence of the text part, None where it has no limit."""
    text = text_config(config)
    for name in ("max_position_embeddings", "n_positions", "max_target_positions", "seq_length", "max_seq_len"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            counted_from_padding = getattr(text, "model_type", "") in POSITIONS_AFTER_PADDING
            return max(value - (getattr(text, "pad_token_id", None) or 0) - 1, 1) if counted_from_padding else value
    return None


def vocabulary(config: Any) -> int:
    """Number of token ids. Raises `MergeidError` where the config has none."""
    size = getattr(text_config(config), "vocab_size", None)
    if not isinstance(size, int) or size < 1:
        raise MergeidError(
            f"config.json (model_type {config.model_type!r}) has no vocab_size, but the model takes input_ids; "
            "add vocab_size to the config"
        )
    return size


def _special_ids(config: Any) -> set[int]:
    ids: set[int] = set()
    for part in (config, text_config(config)):
        for name, value in vars(part).items():
            if not name.endswith(("token_id", "token_index")):
                continue
            values = value if isinstance(value, (list, tuple)) else [value]
            ids.update(v for v in values if isinstance(v, int))
    return ids


def _first_id(value: Any) -> int | None:
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return value if isinstance(value, int) else None


def token_ids(config: Any, batch_size: int, length: int, generator: torch.Generator) -> Tensor:
    """Random ordinary token ids [batch, length]; the last one is the end token, which some heads look for."""
    import torch

    size = vocabulary(config)
    special = _special_ids(config)
    ordinary = torch.tensor([i for i in range(min(size, 4096)) if i not in special] or [0])
    ids = ordinary[torch.randint(len(ordinary), (batch_size, length), generator=generator)]
    end = _first_id(getattr(text_config(config), "eos_token_id", None))
    if end is not None and 0 <= end < size:
        ids[:, -1] = end
    return ids


def image_shape(config: Any) -> tuple[int, int, int]:
    """(channels, height, width) of the image tower's input."""
    vision = vision_config(config)
    channels = 3
    for name in ("num_channels", "in_channels", "in_chans"):
        if isinstance(getattr(vision, name, None), int):
            channels = getattr(vision, name)
            break
    size = getattr(vision, "image_size", None) or getattr(config, "image_size", None) or DEFAULT_IMAGE_SIZE
    if isinstance(size, Mapping):
        size = (size.get("height", DEFAULT_IMAGE_SIZE), size.get("width", DEFAULT_IMAGE_SIZE))
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return channels, int(height), int(width)


def _config_numbers(config: Any) -> frozenset[int]:
    found: set[int] = set()
    for value in vars(config).values():
        if isinstance(value, int):
            found.add(value)
        elif hasattr(value, "model_type") and hasattr(value, "to_dict"):
            found |= _config_numbers(value)
    return frozenset(found)


def example_inputs(model: nn.Module, task: str, generator: torch.Generator, batch_size: int) -> Batch:
    """A random batch with everything that the model's forward needs, on the CPU.

    Shapes depend on the config and `batch_size` alone; values come from `generator`.
    """
    import torch

    config: Any = model.config
    names = parameters_of(model)
    batch: Batch = {}
    avoid = _config_numbers(config) | {batch_size}
    length = sequence_length(config, position_limit(config), avoid)

    if "pixel_values" in names:
        channels, height, width = image_shape(config)
        shape: tuple[int, ...] = (batch_size, channels, height, width)
        frames = getattr(config, "num_frames", None)
        if isinstance(frames, int) and model.main_input_name == "pixel_values" and "Video" in type(model).__name__:
            shape = (batch_size, frames, channels, height, width)
        batch["pixel_values"] = torch.randn(shape, generator=generator)
    if "pixel_values_videos" in names and model.main_input_name == "pixel_values_videos":
        channels, height, width = image_shape(config)
        frames = int(getattr(config, "num_frames", 0) or getattr(config, "frames_per_clip", 0) or 4)
        batch["pixel_values_videos"] = torch.randn((batch_size, frames, channels, height, width), generator=generator)
    if "input_features" in names:
        batch["input_features"] = torch.randn(_feature_shape(config, batch_size), generator=generator)
    if "input_values" in names:
        batch["input_values"] = torch.randn(_waveform_shape(config, batch_size), generator=generator)
    if "input_ids" in names and _takes_text(model, config):
        batch["input_ids"] = token_ids(config, batch_size, length, generator)
        if "attention_mask" in names:
            batch["attention_mask"] = torch.ones(batch_size, length, dtype=torch.long)
    if task == "choice" and "input_ids" in batch:  # [batch, choices, tokens]: every choice is a text of its own
        shape = (batch_size, CHOICES, length)
        batch["input_ids"] = token_ids(config, batch_size * CHOICES, length, generator).reshape(shape)
        batch["attention_mask"] = torch.ones(shape, dtype=torch.long)
    # Classifiers on encoder-decoders make the decoder's input from the encoder's.
    if "decoder_input_ids" in names and task not in EXAMPLE_TASKS | {"question"}:
        target = sequence_length(config, position_limit(config), avoid | {length})
        batch["decoder_input_ids"] = token_ids(config, batch_size, target, generator)
    if not batch:
        raise MergeidError(
            f"mergeid cannot make inputs for {type(model).__name__}: its forward takes {', '.join(sorted(names))}; "
            "give calibration data with --data"
        )
    _join_image_and_text(model, config, batch)
    labels = _labels(task, config, batch, batch_size, generator)
    if labels is not None:
        batch["labels"] = labels
    return batch


def _takes_text(model: nn.Module, config: Any) -> bool:
    """Whether input_ids is a real input (some decoders in vision models list it in vain)."""
    return isinstance(getattr(text_config(config), "vocab_size", None), int) and model.main_input_name not in (
        "input_features",
        "input_values",
    )


def _feature_shape(config: Any, batch_size: int) -> tuple[int, ...]:
    """Log-mel features: [batch, mel, frames] where positions are counted (Whisper), else [batch, frames, mel]."""
    mel = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", None) or 80
    positions = getattr(config, "max_source_positions", None)
    if isinstance(positions, int) and getattr(config, "model_type", "") not in ("speech_to_text", "speech_to_text_2"):
        return batch_size, int(mel), 2 * positions
    width = getattr(config, "feature_projection_input_dim", None) or mel
    return batch_size, 31, int(width)


def _waveform_shape(config: Any, batch_size: int) -> tuple[int, ...]:
    """Raw audio [batch, samples], long enough for some frames after all strides; spectrogram patches otherwise."""
    if isinstance(getattr(config, "num_mel_bins", None), int) and isinstance(getattr(config, "max_length", None), int):
        return batch_size, config.max_length, config.num_mel_bins
    stride = 1
    for s in getattr(config, "conv_stride", None) or (320,):
        stride *= int(s)
    return batch_size, 16 * stride


def _join_image_and_text(model: nn.Module, config: Any, batch: Batch) -> None:
    """Put as many image placeholders into the text as the image tower gives vectors (LLaVA and its kin); where
    that cannot be found out, leave the image out, so that the text part is traced and the image part frozen."""
    import torch

    if "pixel_values" not in batch or "input_ids" not in batch:
        return
    token = next((t for f in IMAGE_TOKEN_FIELDS if isinstance(t := getattr(config, f, None), int)), None)
    if token is None:
        return
    count = _image_vectors(model, batch["pixel_values"])
    if count is None:
        del batch["pixel_values"]
        return
    size = batch["input_ids"].shape[0]
    places = torch.full((size, count), token, dtype=torch.long)
    batch["input_ids"] = torch.cat((places, batch["input_ids"]), dim=1)
    if "attention_mask" in batch:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])


def _image_vectors(model: Any, pixels: Tensor) -> int | None:
    """Number of vectors per image, from one run of the image tower; None where it wants other inputs."""
    import torch

    owner = next((o for o in (model, getattr(model, "model", None)) if hasattr(o, "get_image_features")), None)
    if owner is None:
        return None
    try:
        with torch.no_grad():
            found = owner.get_image_features(pixels.to(next(model.parameters()).device))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
        return None
    found = getattr(found, "pooler_output", found)
    if isinstance(found, (list, tuple)):
        found = torch.cat([f.reshape(-1, f.shape[-1]) for f in found])
    rows = found.numel() // found.shape[-1]
    return rows // pixels.shape[0] if rows % pixels.shape[0] == 0 else None


def _labels(task: str, config: Any, batch: Batch, batch_size: int, generator: torch.Generator) -> Tensor | None:
    import torch

    if task in ("causal", "masked"):
        return batch["input_ids"].clone() if "input_ids" in batch else None
    if task == "seq2seq" and "decoder_input_ids" in batch:
        shape = batch["decoder_input_ids"].shape
        return torch.randint(vocabulary(config), shape, generator=generator)
    classes = CHOICES if task == "choice" else class_count(config)
    if classes < 2 or getattr(config, "problem_type", None) not in (None, "single_label_classification"):
        return None
    if task in EXAMPLE_TASKS:
        return torch.randint(classes, (batch_size,), generator=generator)
    if task == "token":
        return torch.randint(classes, batch["input_ids"].shape, generator=generator)
    return None
