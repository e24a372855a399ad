"""The rarer arguments of a forward pass by name: how each is made. Those of `ALWAYS` are given to every model that
takes them (without them a branch stays idle), the others only where the model insists."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from mergeid_transformers import media
from mergeid_transformers.media import Draft, number, ones, vision_part

if TYPE_CHECKING:
    from torch import Tensor

Maker = Callable[[Draft], Any]
BOXES = 5
REGIONS = 6


def _hidden(config: Any) -> int:
    return number(config, "hidden_size", "d_model", "n_embd", "embed_dim", "dim", "hidden_dim") or 64


def _vectors(draft: Draft) -> Tensor:
    """What comes before a tower without an embedding of its own."""
    config = draft.config
    if "grid_thw" in draft.names:
        return media.patches(draft)
    first = next((m for m in draft.model.modules() if getattr(m, "weight", None) is not None), None)
    if draft.model.main_input_name == "pixel_values" and type(first).__name__ == "Conv2d":
        return media.pixels(draft)
    if config.model_type == "vibevoice_acoustic_tokenizer_decoder":
        return draft.random(draft.size, _hidden(config), 8)
    if config.model_type == "vibevoice_acoustic_tokenizer_encoder":
        return draft.random(draft.size, 1, media.CODEC_SAMPLES)
    width = number(config, "input_dim", "input_size", "backbone_hidden_size") or _hidden(config)
    return draft.random(draft.size, draft.length, width)


def _encoder_states(draft: Draft) -> Tensor:
    config = draft.config
    width = number(config, "encoder_hidden_size", "cross_hidden_size", "vision_hidden_size") or _hidden(config)
    if "context_hidden_states" in draft.names:
        for name, module in draft.model.named_modules():
            if name.rpartition(".")[2] == "fc":
                width = module.in_features
    return draft.random(draft.size, media.SIDE**2 if "backbone_features" in draft.names else 7, width)


def _boxes(draft: Draft) -> Tensor:
    """[batch, tokens, 4]: left, top, right, bottom on a page."""
    import torch

    limit = number(draft.config, "max_2d_position_embeddings") or 100
    corners = draft.integers(limit // 2, draft.size, draft.length, 2)
    return torch.cat((corners, corners + draft.integers(limit // 4, draft.size, draft.length, 2)), -1)


def _bros_boxes(draft: Draft) -> Tensor:
    return _boxes(draft).float() / 100 if draft.config.model_type == "bros" else _boxes(draft)


def _udop_boxes(draft: Draft) -> Tensor:
    return _boxes(draft).float() / 100 if draft.config.model_type == "udop" else _bros_boxes(draft)


def _flat_patches(draft: Draft) -> Tensor:
    """[batch, patches, row and column and pixels] (Pix2Struct)."""
    import torch

    vision = vision_part(draft.config)
    size = media.side(getattr(vision, "patch_size", None)) or 16
    width = number(vision, "patch_embed_hidden_size") or 3 * size * size
    n = media.SIDE
    rows = torch.arange(1, n + 1).repeat_interleave(n).float()
    columns = torch.arange(1, n + 1).repeat(n).float()
    places = torch.stack((rows, columns), -1).expand(draft.size, -1, -1)
    return torch.cat((places, draft.random(draft.size, n * n, _patch_width(draft, width))), -1)


def _patch_width(draft: Draft, width: int) -> int:
    from torch import nn

    for name, module in draft.model.named_modules():
        if isinstance(module, nn.Linear) and "patch_projection" in name:
            return module.in_features
    return width


def _past(draft: Draft) -> Tensor:
    """A time series: [batch, steps] or [batch, steps, channels]."""
    config = draft.config
    steps = number(config, "context_length") or 32
    lags = getattr(config, "lags_sequence", None)
    if lags:
        steps += max(lags)
    width = number(config, "num_input_channels")
    shape = (draft.size, steps, width) if width else (draft.size, steps)
    if width is None and (number(config, "input_size") or 1) > 1 and lags:
        shape = (*shape, config.input_size)
    return draft.random(*shape)


def _time_features(draft: Draft) -> Tensor:
    steps = draft.batch["past_values"].shape[1]
    return draft.random(draft.size, steps, _time_width(draft))


def _time_width(draft: Draft) -> int:
    return int(getattr(draft.config, "num_time_features", 0) or 0)


def _mel(draft: Draft, last: bool) -> Tensor:
    width = number(draft.config, "model_in_dim", "num_mel_bins", "mel_dim", "spectrogram_bins") or 80
    return draft.random(draft.size, 8, width) if last else draft.random(draft.size, width, 8)


def _spatial(draft: Draft) -> Tensor:
    import torch

    if "input_ids" not in draft.names and draft.config.model_type.startswith("minicpm"):
        return torch.full((draft.size, 2), media.SIDE)
    rows = 1 if "vision_features" in draft.names else draft.size  # one level of features, not one image each
    return torch.full((rows, 2), media.SIDE)


def _features_mask(draft: Draft) -> Tensor:
    """[batch, frames] of ones."""
    given = draft.batch["input_features"]
    mel, fixed = media.mel_bins(draft.config), number(media.audio_part(draft.config), "num_stacked_frames")
    last = media.mel_first(draft) or (given.shape[1] == mel and given.shape[-1] == media.FRAMES and not fixed)
    mask = ones(draft, draft.size, given.shape[-1] if last else given.shape[1])
    return mask.bool() if draft.config.model_type.startswith("gemma") else mask


_OF_MANY_SIZES = ("emu3", "apertus1p5", "pixtral", "mistral3", "lighton_ocr", "aria", "chameleon")


def _image_sizes(draft: Draft) -> Tensor | None:
    """[images, 2], for models that cut or pad images of any size."""
    import torch

    config = draft.config
    vision = getattr(vision_part(config), "model_type", "")
    if not getattr(config, "image_grid_pinpoints", None) and not {config.model_type, vision} & {*_OF_MANY_SIZES}:
        return None
    _, height, width = media.image_shape(draft.config)
    return torch.tensor([[height, width]]).repeat(draft.size, 1)


def _trajectory(draft: Draft, width: int) -> Tensor:
    return draft.random(draft.size, draft.length, width)


def _tokens(field: str = "") -> Maker:
    def make(draft: Draft) -> Tensor:
        part = getattr(draft.config, field, None) if field else None
        size = number(part, "vocab_size") or number(draft.config, "vocab_size") or 20
        return 2 + draft.integers(size - 3, draft.size, 9)

    return make


def _prompts(draft: Draft) -> Tensor:
    """Segment Anything: points [batch, objects, points, 2]."""
    return draft.random(draft.size, 2, 3, 2).abs() * 16


def _pixels_or_frames(draft: Draft) -> Tensor:
    return media.pixels(draft)


def _mask_input(draft: Draft) -> Tensor:
    """[batch, 1, height, width]: four values along each side of a patch (Segment Anything)."""
    side = 4 * (number(draft.config, "image_size") or 64) // (number(draft.config, "patch_size") or 16)
    return draft.random(draft.size, 1, side, side)


def _map(draft: Draft, shrink: int = 1) -> Tensor:
    """[batch, hidden / shrink, height, width] of an image at one level of a pyramid."""
    side = {1: 4, 4: 8, 8: 16}[shrink]
    return draft.random(draft.size, _hidden(draft.config) // shrink, side, side)


def _patch_numbers(draft: Draft) -> Tensor:
    """[batch, tokens]: the patch of every byte, in order."""
    import torch

    return (torch.arange(draft.length) // 3).repeat(draft.size, 1)


_CROSS = frozenset(
    {"blip_2_qformer", "instructblip_qformer", "instructblipvideo_qformer", "dia_decoder", "t5gemma2_decoder"}
)


def _position_mask(draft: Draft) -> Tensor:
    """Kosmos-2: the tokens whose embeddings an image takes."""
    mask = ones(draft, draft.size, draft.length).bool()
    mask[:, number(draft.config, "latent_query_num") or 0 :] = False
    return mask


def _pixel_mask(draft: Draft) -> Tensor | None:
    if "spatial_shapes" in draft.names:
        return ones(draft, draft.size, media.SIDE**2)
    if draft.config.model_type == "granite_docling":
        _, height, width = media.image_shape(draft.config)
        return ones(draft, draft.size, 1, height, width).bool()
    return None


def _global_mask(draft: Draft) -> Tensor:
    """Longformer: the first token looks at all and is looked at by all."""
    mask = ones(draft, draft.size, draft.length) * 0
    mask[:, 0] = 1
    return mask


def _padding_mask(draft: Draft) -> Tensor | None:
    """[batch, samples or frames], for the models that count them."""
    if not draft.config.model_type.startswith(("vibevoice", "moss_transcribe")):
        return None
    given = draft.batch.get("input_values", draft.batch.get("input_features"))
    return None if given is None else ones(draft, draft.size, given.shape[-1]).bool()


def _patch_places(draft: Draft) -> Tensor:
    """[images, patches, 2]: column and row."""
    import torch

    n = torch.arange(media.SIDE**2)
    return torch.stack((n % media.SIDE, n // media.SIDE), -1).expand(draft.size, -1, -1).contiguous()


ALWAYS: dict[str, Maker] = {
    "patch_ids": _patch_numbers,
    "last_hidden_state": lambda d: (
        d.random(d.size, 1, d.config.input_size) if d.config.model_type == "moshi_depth" else None
    ),
    "t_cond": lambda d: d.random(d.size, 1, _hidden(d.config)),
    "num_patches": lambda d: (d.length + 2) // 3 if "patch_ids" in d.names else None,
    "inputs_embeds": lambda d: _vectors(d) if d.config.model_type == "blt_local_decoder" else None,
    "patch_embeds": lambda d: (
        d.random(d.size, 5, cast("Any", d.model).patch_embedding_projection.in_features)
        if d.config.model_type == "blt_local_decoder"
        else None
    ),
    "intermediate_embeddings": lambda d: (
        [d.random(d.size, 4, 4, d.config.vit_dim)] if d.config.model_type == "sam_hq_mask_decoder" else None
    ),
    "pixel_position_ids": _patch_places,
    "image_position_ids": _patch_places,
    "image_embeds_position_mask": _position_mask,
    "encoder_hidden_states": lambda d: _encoder_states(d) if d.config.model_type in _CROSS else None,
    "image_attention_mask": lambda d: ones(d, d.size, d.length, 1) if d.config.model_type == "idefics" else None,
    "bbox": _udop_boxes,
    "input_features_mask": _features_mask,
    "feature_attention_mask": _features_mask,
    "image_grid_thw": media.grid,
    "grid_thw": lambda d: media.grid(d) if "pixel_values" in d.names else None,
    "feature_lens": lambda d: ones(d, d.size) * (d.batch["input_features"].shape[1] // d.size),
    "vision_pos_embeds": lambda d: [_map(d)],
    "pixel_attention_mask": _pixel_mask,
    "padding_mask": _padding_mask,
    "image_merge_sizes": lambda d: ones(d, d.size),
    "high_res_pixel_values": lambda d: d.random(d.size, *media.image_shape(d.config.high_res_vision_config)),
    "aspect_ratio_ids": lambda d: ones(d, d.size, 1),
    "aspect_ratio_mask": lambda d: ones(d, d.size, 1, number(vision_part(d.config), "max_num_tiles") or 4),
    "cross_attention_mask": lambda d: (
        ones(d, d.size, d.length, 1, d.config.vision_config.max_num_tiles) if d.config.model_type == "mllama" else None
    ),
    "protein_input_ids": lambda d: 4 + d.integers(16, d.size, 9),
    "protein_attention_mask": lambda d: ones(d, d.size, 9),
    "spatial_shapes": _spatial,
    "image_sizes": _image_sizes,
    "visual_feats": lambda d: d.random(d.size, REGIONS, number(d.config, "visual_feat_dim") or 2048),
    "visual_pos": lambda d: d.random(d.size, REGIONS, number(d.config, "visual_pos_dim") or 4).abs(),
    "visual_embeds": lambda d: d.random(d.size, REGIONS, number(d.config, "visual_embedding_dim") or 512),
    "flattened_patches": _flat_patches,
    "input_points": _prompts,
    "states": lambda d: _trajectory(d, d.config.state_dim),
    "actions": lambda d: (
        d.random(d.size, d.config.chunk_size, d.config.max_action_dim)
        if number(d.config, "max_action_dim")
        else _trajectory(d, number(d.config, "act_dim") or 4)
    ),
    "rewards": lambda d: _trajectory(d, 1),
    "returns_to_go": lambda d: _trajectory(d, 1),
    "timesteps": lambda d: d.integers(d.config.max_ep_len, d.size, d.length),
    "task_inputs": lambda d: d.integers(40, d.size, number(d.config, "task_seq_len") or 9),
    "qformer_input_ids": _tokens("qformer_config"),
    "is_longer": lambda d: ones(d, d.size, 1).bool(),
    "prompt_depth": lambda d: d.random(d.size, 1, 16, 16).abs(),
    "target_sizes": lambda d: _spatial(d),
    "future_values": lambda d: (
        d.random(d.size, d.config.prediction_length) if _time_width(d) or hasattr(d.config, "lags_sequence") else None
    ),
    "future_time_features": lambda d: d.random(d.size, d.config.prediction_length, _time_width(d)),
    "moe_mm_token_type_ids": lambda d: d.integers(2, *d.batch["input_ids"].shape),
    "entity_ids": lambda d: 1 + d.integers((number(d.config, "entity_vocab_size") or 2) - 1, d.size, 3),
    "entity_attention_mask": lambda d: ones(d, d.size, 3),
    "entity_position_ids": lambda d: 2 + d.integers(8, d.size, 3, 2),
    "global_attention_mask": _global_mask,
    "query_embeds": lambda d: d.random(d.size, 8, _hidden(d.config)) if d.config.model_type in _CROSS else None,
}
REQUIRED: dict[str, Maker] = {
    "image_embeddings": _map,
    "image_positional_embeddings": _map,
    "sparse_prompt_embeddings": lambda d: d.random(d.size, 2, 3, _hidden(d.config)),
    "dense_prompt_embeddings": _map,
    "multimask_output": lambda d: True,
    "hq_token_only": lambda d: False,
    "high_resolution_features": lambda d: [_map(d, 8), _map(d, 4)],
    "input_labels": lambda d: ones(d, d.size, 2, 3),
    "input_boxes": lambda d: d.random(d.size, 2, 4).abs() * 16,
    "input_masks": _mask_input,
    "box_embeddings": lambda d: d.random(d.size, BOXES, 4).sigmoid(),
    "box_mask": lambda d: ones(d, d.size, BOXES).bool(),
    "box_labels": lambda d: d.integers(2, d.size, BOXES),
    "img_feats": lambda d: [_map(d)],
    "noisy_images": lambda d: d.random(d.size, d.config.latent_size),
    "timesteps": lambda d: d.random(d.size).abs(),
    "condition": lambda d: d.random(d.size, _hidden(d.config)),
    "num_patches": lambda d: d.length // 2,
    "past_values": _past,
    "past_time_features": _time_features,
    "past_observed_mask": lambda d: ones(d, *d.batch["past_values"].shape),
    "grid_thw": media.grid,
    "merge_sizes": lambda d: ones(d, d.size),
    "hidden_states": _vectors,
    "inputs_embeds": _vectors,
    "noise_embeds": _vectors,
    "query_embeds": lambda d: d.random(d.size, 8, _hidden(d.config)),
    "encoder_hidden_states": _encoder_states,
    "context": _encoder_states,
    "context_hidden_states": _encoder_states,
    "latents": lambda d: d.random(d.size, _hidden(d.config), 8),
    "spectrogram": lambda d: _mel(d, True),
    "mel_spectrogram": lambda d: _mel(d, False),
    "audio_mel": lambda d: d.random(d.size, media.FRAMES, number(d.config, "input_feat_size") or 32),
    "audio_mel_mask": lambda d: ones(d, d.size, media.FRAMES) == 0,
    "chunk_sample_lengths": lambda d: ones(d, d.size) * media.SAMPLES,
    "image": media.pixels,
    "audio_input_ids": lambda d: d.integers(16, d.size, d.length, number(d.config, "num_codebooks", "n_mel_bins") or 4),
    "state": lambda d: d.random(d.size, number(d.config, "max_state_dim") or 32),
    "prompt_pixel_values": media.pixels,
    "prompt_masks": media.pixels,
    "classes_input_ids": lambda d: d.text(d.size * 2, 5),
    "classes_attention_mask": lambda d: ones(d, d.size * 2, 5),
    "tasks_input_ids": lambda d: d.text(d.size, 7),
    "tasks_attention_mask": lambda d: ones(d, d.size, 7),
    "classes_structure": lambda d: ones(d, d.size) * 2,
    "mask": lambda d: ones(d, d.size, d.length).bool(),
    "attention_mask": lambda d: ones(d, d.size, d.length),
    "patch_embeds": lambda d: (
        d.random(d.size, _hidden(d.config), 4, 4) if d.config.model_type.startswith("unlimited_ocr") else _vectors(d)
    ),
    "vision_features": lambda d: (
        [_map(d)] if "vision_pos_embeds" in d.names else d.random(d.size, media.SIDE**2, _hidden(d.config))
    ),
    "text_features": _encoder_states,
    "vision_pos_encoding": lambda d: d.random(d.size, media.SIDE**2, _hidden(d.config)),
    "decoder_queries": _encoder_states,
    "backbone_features": lambda d: [d.random(d.size, _hidden(d.config), n, n) for n in (16, 8, 4)],
}


def add(draft: Draft) -> None:
    """Put into the batch what the model's forward takes besides text, images and sound."""
    for makers, wanted in ((REQUIRED, draft.required), (ALWAYS, draft.names)):
        for name, maker in makers.items():
            if name in draft.batch or name not in wanted:
                continue
            try:
                value = maker(draft)
            except (AttributeError, KeyError, TypeError):
                continue  # the configuration has nothing of this kind
            if value is not None:
                draft.batch[name] = value
