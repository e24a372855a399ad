"""Images, videos, audio and the rarer arguments of a forward pass, as small random tensors.

Shapes are read off the configuration. An argument that can be made is made, so that every branch of a model with
several kinds of input runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mergeid.plugins import Batch

MEL_FIELDS = (
    *("num_mel_bins", "n_mel_bins", "num_mel_channels", "input_feat_per_channel", "input_feat_size", "n_mels"),
    *("mel_bins", "feature_size"),
)
MEL_LAST = frozenset({"univnet", "speech_to_text", "nemotron3_5_transcribe_audio"})
"""Their first layer is a convolution, but they transpose their input themselves."""
MEL_FIRST = frozenset({"qwen3_asr_encoder", "qwen3_omni_moe_audio_encoder"})
"""Their first layer is a convolution over mel bins and frames as over an image."""
AUDIO_PARTS = ("audio_config", "encoder_config", "speech_config", "audio_encoder", "encoder", "semantic_model_config")
VISION_PARTS = (
    "vision_config",
    "vision_tower_config",
    "vision",
    "encoder",
    "backbone_config",
    "image_config",
    "sam_config",
    "vlm_config",
)
DEFAULT_IMAGE_SIZE = 64
SIDE = 4
"""Patches along each side of an image that comes as a list of patches, before merging (times the merge size)."""
FRAMES = 32
AS_PICTURES = ("kimi_k25", "paddleocr_vl")
"""Their patches are small pictures, not rows."""
LINES = ("pp_ocrv5_server_rec", "pp_ocrv6_small_rec", "pp_ocrv6_tiny_rec")
"""Their network leaves one row of a line of text 48 pixels high."""
SAMPLES = 1920
CODEC_SAMPLES = 3840


@dataclass
class Draft:
    """A batch in the making."""

    model: nn.Module
    config: Any
    names: frozenset[str]
    required: frozenset[str]
    batch: Batch
    size: int
    length: int
    generator: torch.Generator
    text: Callable[[int, int], Tensor]
    """Random token ids [rows, length]."""

    def random(self, *shape: int) -> Tensor:
        import torch

        return torch.randn(shape, generator=self.generator)

    def integers(self, high: int, *shape: int) -> Tensor:
        import torch

        return torch.randint(max(high, 1), shape, generator=self.generator)


def number(config: Any, *fields: str) -> int | None:
    """The first of the fields that holds a positive integer."""
    for name in fields:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def side(value: Any) -> int | None:
    """A size that is stated as one number, a pair or a mapping."""
    if isinstance(value, Mapping):
        value = value.get("height", next(iter(value.values()), None))
    if isinstance(value, (list, tuple)):
        value = value[-1] if value else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def vision_part(config: Any) -> Any:
    """The part of a configuration that describes the image tower (the configuration itself where there is one)."""
    for name in VISION_PARTS:
        part = getattr(config, name, None)
        if part is not None and not isinstance(part, (Mapping, str, int)):
            deeper = name == "vlm_config" or (name == "encoder" and hasattr(part, "vision_config"))
            return vision_part(part) if deeper else part
    thinker = getattr(config, "thinker_config", None)
    return vision_part(thinker) if thinker is not None else config


def audio_part(config: Any) -> Any:
    """The part of a configuration that describes the audio tower."""
    for name in AUDIO_PARTS:
        part = getattr(config, name, None)
        if part is not None and not isinstance(part, (Mapping, str, int)):
            return audio_part(part) if name != "encoder" else part
    thinker = getattr(config, "thinker_config", None)
    return audio_part(thinker) if thinker is not None else config


# -- images ----------------------------------------------------------------------------------------------------------


def channels(config: Any) -> int:
    return number(config, "num_channels", "in_channels", "in_chans", "n_channels", "num_input_channels") or 3


def image_shape(config: Any) -> tuple[int, int, int]:
    """(channels, height, width) of the image tower's input."""
    vision = vision_part(config)
    size: Any = None
    args = getattr(vision, "model_args", None)
    if isinstance(args, Mapping):
        size = args.get("img_size")
    for part in (vision, config):
        for name in ("image_size", "img_size", "input_size", "pretrain_image_size"):
            size = size or getattr(part, name, None)
    if isinstance(size, Mapping):
        size = (size.get("height", DEFAULT_IMAGE_SIZE), size.get("width", DEFAULT_IMAGE_SIZE))
    size = size or DEFAULT_IMAGE_SIZE
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return channels(vision), int(height), int(width)


def merge_size(config: Any) -> int:
    vision = vision_part(config)
    for part in (vision, config):
        value = getattr(part, "spatial_merge_size", None) or getattr(part, "merge_size", None)
        value = value or getattr(part, "merge_kernel_size", None)
        if side(value):
            return int(side(value) or 1)
    return 2


def grid(draft: Draft) -> Tensor:
    """[images, 3]: time, height and width in patches."""
    import torch

    n = SIDE * merge_size(draft.config)
    return torch.tensor([[1, n, n]]).repeat(draft.size, 1)


def patches(draft: Draft) -> Tensor:
    """[all patches, channels · time · height · width of a patch]."""
    from torch import nn

    vision = vision_part(draft.config)
    size = side(getattr(vision, "patch_size", None)) or 14
    time = number(vision, "temporal_patch_size") or 1
    width = channels(vision) * time * size * size
    for module in draft.model.modules():
        # the tower's own word on it
        linear = getattr(module, "patch_embed", None) or getattr(module, "patch_embedding", None)
        proj = getattr(linear, "proj", linear)
        if isinstance(proj, nn.Linear):
            width = proj.in_features
            break
    count = int(grid(draft).prod(1).sum())
    if draft.config.model_type.startswith(AS_PICTURES):
        shape = (count, channels(vision), size, size)
        return draft.random(1, *shape) if draft.config.model_type == "paddleocr_vl_vision" else draft.random(*shape)
    return draft.random(count, width)


def padded_patches(draft: Draft) -> Tensor:
    """[images, patches, channels · height · width of a patch] (SigLIP 2)."""
    vision = vision_part(draft.config)
    size = side(getattr(vision, "patch_size", None)) or 16
    return draft.random(draft.size, SIDE * SIDE, channels(vision) * size * size)


def pixels(draft: Draft) -> Tensor:
    """The image input in the shape that this model's other arguments speak of."""
    from torch import nn

    names = draft.names
    if names & {"image_grid_thw", "grid_thw", "image_grid_hws", "grid_hws"}:
        return patches(draft)
    if "spatial_shapes" in names:
        return padded_patches(draft)
    c, h, w = image_shape(draft.config)
    h, w = _fixed(draft.model) or (h, w)
    kind = type(draft.model).__name__
    model_type = draft.config.model_type
    if model_type == "fuyu":
        size = side(draft.config.patch_size) or 30
        return draft.random(draft.size, SIDE * SIDE, channels(draft.config) * size * size)
    if names & {"pixel_position_ids", "image_position_ids"} or isinstance(
        getattr(draft.model, "patch_embedding", None), nn.Linear
    ):
        return padded_patches(draft)
    if kind.endswith("ForTextRecognition"):
        height = 48 if draft.config.model_type in LINES else 96
        return draft.random(draft.size, c, height, 320)
    if kind == "XCLIPVisionModel":  # the frames of a video behind each other
        return draft.random(draft.size * (number(draft.config, "num_frames") or 1), c, h, w)
    if "target_sizes" in names and draft.model.main_input_name == "pixel_values" and "input_ids" not in names:
        size = side(draft.config.patch_size) or 14
        return draft.random(1, c, size, size * SIDE * SIDE * draft.size)  # the patches of all images in a row
    if model_type == "seggpt":
        h //= 2
    if model_type in ("mllama", "mllama_vision_model"):
        return draft.random(draft.size, 1, number(vision_part(draft.config), "max_num_tiles") or 4, c, h, w)
    if model_type == "idefics":
        return draft.random(draft.size, 1, c, h, w)
    if model_type in ("instructblipvideo", "inkling_vision"):
        return draft.random(draft.size, 2, c, h, w)
    if "KeypointMatching" in kind:
        return draft.random(draft.size, 2, c, h, w)
    frames = number(vision_part(draft.config), "num_frames") or number(draft.config, "num_frames")
    if frames and ("Video" in kind or kind == "XCLIPModel" or "Vivit" in kind or "Timesformer" in kind):
        return draft.random(draft.size, frames, c, h, w)
    return draft.random(draft.size, c, h, w)


def _fixed(model: nn.Module) -> tuple[int, int] | None:
    """The image size that a tower of timm insists on."""
    for module in model.modules():
        size = getattr(module, "img_size", None)
        if type(module).__name__ == "PatchEmbed" and getattr(module, "strict_img_size", False) and size:
            return int(size[0]), int(size[1])
    return None


def videos(draft: Draft) -> Tensor | None:
    if "video_grid_thw" in draft.names:
        return None  # the same tower as images
    vision = vision_part(draft.config)
    c, h, w = image_shape(draft.config)
    h, w = _fixed(draft.model) or (h, w)
    frames = (
        number(draft.config, "num_frames", "frames_per_clip") or number(vision, "num_frames", "frames_per_clip") or 4
    )
    return draft.random(draft.size, frames, c, h, w)


# -- audio -----------------------------------------------------------------------------------------------------------


def mel_bins(config: Any) -> int:
    for part in (audio_part(config), config):
        if getattr(part, "model_type", "") == "gemma4_audio":
            return int(part.subsampling_conv_channels[0])
        found = number(part, *MEL_FIELDS)
        if found:
            return found
    return 80


def features(draft: Draft) -> Tensor:
    """Log-mel features: [batch, mel, frames] where the first layer is a convolution over them, else [batch, frames,
    mel]."""
    from torch import nn

    mel = mel_bins(draft.config)
    audio = audio_part(draft.config)
    frames = FRAMES
    positions = number(audio, "max_source_positions")
    if number(audio, "n_window") and {"input_features_mask", "padded_feature_length", "feature_lens"} & draft.names:
        frames = 2 * int(audio.n_window)
    if "feature_lens" in draft.names and "feature_attention_mask" not in draft.names:
        return draft.random(mel, draft.size * frames)  # one sound behind the other
    if draft.config.model_type == "voxtral_realtime":
        return draft.random(draft.size, mel, 8 * draft.length)  # eight frames beside every token
    if mel_first(draft):
        if positions and not _as_image(draft.config):
            frames = 2 * positions
        return draft.random(draft.size, mel, frames)
    width = number(draft.config, "num_chroma") or number(audio, "feature_projection_input_dim", "input_dim") or mel
    width *= number(audio, "num_stacked_frames") or 1
    for name, module in draft.model.named_modules():
        if name.rpartition(".")[2] == "input_linear" and isinstance(module, nn.Linear):
            width = module.in_features  # mel bins with their differences, several frames at a time
    if draft.config.model_type == "pop2piano":
        width = draft.config.d_model
    if draft.config.model_type.startswith("clap"):
        return draft.random(draft.size, 1, 200, mel)
    return draft.random(draft.size, frames, width)


def mel_first(draft: Draft) -> bool:
    """Whether features come as [batch, mel, frames]: where the first layer is a convolution over them."""
    from torch import nn

    mel = mel_bins(draft.config)
    if _as_image(draft.config):
        return True
    convolved = any(isinstance(m, nn.Conv1d) and m.in_channels == mel for m in draft.model.modules())
    return convolved and draft.config.model_type not in MEL_LAST


def _as_image(config: Any) -> bool:
    return bool(MEL_FIRST & {config.model_type, getattr(audio_part(config), "model_type", "")})


def samples(draft: Draft) -> Tensor:
    """Raw audio [batch, samples] or [batch, 1, samples], long enough for some frames after all strides; spectrogram
    patches [batch, frames, mel] where the configuration counts frames."""
    config = draft.config
    if number(config, "num_mel_bins") and number(config, "max_length"):
        return draft.random(draft.size, config.max_length, config.num_mel_bins)
    audio = config if getattr(config, "audio_channels", None) or _wants_channel(config) else audio_part(config)
    strides = getattr(audio, "conv_stride", None)
    stride = 1
    for s in strides if isinstance(strides, (list, tuple)) else ():
        stride *= int(s)
    count = 16 * stride if stride > 1 else CODEC_SAMPLES
    hop = number(config, "hop_length")
    if hop and "input_features" in draft.required and "input_features" in draft.batch:
        count = hop * draft.batch["input_features"].shape[1]  # one sound as features and as samples
    if getattr(audio, "audio_channels", None) or _wants_channel(audio):
        return draft.random(draft.size, int(getattr(audio, "audio_channels", None) or 1), count)
    return draft.random(draft.size, count)


def _wants_channel(config: Any) -> bool:
    fields = vars(config)
    return any(
        n in fields for n in ("upsampling_ratios", "downsampling_ratios", "dac_config", "hop_length")
    ) or getattr(config, "model_type", "").startswith(
        ("omniasr", "pe_audio", "vibevoice", "wavtokenizer", "pocket_tts", "xcodec", "neucodec")
    )


def ones(draft: Draft, *shape: int) -> Tensor:
    import torch

    return torch.ones(shape, dtype=torch.long)
