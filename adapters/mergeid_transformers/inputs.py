"""Small random inputs for any transformers class, made from its forward signature and its config."""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING, Any

from mergeid.plugins import Batch, MergeidError
from mergeid_transformers import arguments, media
from mergeid_transformers.configs import _parts, text_config
from mergeid_transformers.media import Draft
from mergeid_transformers.tasks import EXAMPLE_TASKS, class_count

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# Sequence lengths to choose from: long enough to show what is per token, short enough to trace in no time.
LENGTHS = (11, 13, 17, 19, 23, 9, 10, 8)
IMAGE_TOKEN_FIELDS = ("image_token_id", "image_token_index")
TYPES_OF_TOKENS = frozenset({"mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids"})
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


def required_of(model: nn.Module) -> frozenset[str]:
    """Names of the arguments of a model's forward that have no default."""
    kind: Any = type(model)
    found = inspect.signature(kind.forward).parameters.values()
    plain = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return frozenset(p.name for p in found if p.default is p.empty and p.kind not in plain and p.name != "self")


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
    text = text_config(config)
    size = getattr(text, "vocab_size", None) or getattr(text, "num_hash_buckets", None)
    if not isinstance(size, int) or size < 1:
        raise MergeidError(
            f"config.json (model_type {config.model_type!r}) has no vocab_size, but the model takes input_ids; "
            "add vocab_size to the config"
        )
    return size


def _special_ids(config: Any) -> set[int]:
    ids: set[int] = set()
    for part in _parts(config):
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

    def text(rows: int, tokens: int) -> Tensor:
        return token_ids(config, rows, tokens, generator)

    draft = Draft(model, config, names, required_of(model), batch, batch_size, length, generator, text)
    _add_media(draft)
    if "input_ids" in names and _takes_text(model, config):
        batch["input_ids"] = _input_ids(draft)
        if "attention_mask" in names and not config.model_type.startswith("blt_local"):  # they take a finished mask
            batch["attention_mask"] = torch.ones(batch_size, length, dtype=torch.long)
    if task == "choice" and "input_ids" in batch:  # [batch, choices, tokens]: every choice is a text of its own
        shape = (batch_size, CHOICES, length)
        batch["input_ids"] = text(batch_size * CHOICES, length).reshape(shape)
        batch["attention_mask"] = torch.ones(shape, dtype=torch.long)
    # Classifiers on encoder-decoders make the decoder's input from the encoder's.
    if "decoder_input_ids" in names and task not in EXAMPLE_TASKS | {"question"}:
        target = sequence_length(config, position_limit(config), avoid | {length})
        batch["decoder_input_ids"] = _decoder_ids(draft, target)
    if {"input_features", "input_values"} <= batch.keys() and "inputs" in names:
        del batch["input_features"]  # either of them
    if config.model_type == "csm":
        batch.pop("input_values", None)  # its sound stands in the text as code words
    if config.model_type == "pop2piano":
        batch.pop("input_ids", None), batch.pop("attention_mask", None)  # its sound stands in their place
    arguments.add(draft)
    if type(model).forward is torch.nn.Module.forward:
        raise MergeidError(
            f"{type(model).__name__} has no forward pass of its own (its parts are run one by one, by generate() or "
            "another model), so no graph can be traced; merge its tensors as is with --match never"
        )
    if not batch:
        raise MergeidError(
            f"mergeid cannot make inputs for {type(model).__name__}: its forward takes {', '.join(sorted(names))}; "
            "give calibration data with --data"
        )
    _join_media_and_text(model, config, batch)
    if config.model_type == "colqwen2" and "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].unflatten(0, (batch_size, -1))
    labels = _labels(task, config, batch, batch_size, generator)
    if labels is not None:
        batch["labels"] = labels
    return batch


def _add_media(draft: Draft) -> None:
    """Pictures, videos and sounds, where the model takes them."""
    names, batch = draft.names, draft.batch
    if "pixel_values" in names:
        batch["pixel_values"] = media.pixels(draft)
    if "pixel_values_videos" in names:
        videos, main = media.videos(draft), str(draft.model.main_input_name)
        if videos is not None and (main == "pixel_values_videos" or _has_videos(draft.model, draft.config)):
            batch["pixel_values_videos"] = videos
    if "input_features" in names:
        batch["input_features"] = media.features(draft)
    if "input_values" in names:
        batch["input_values"] = media.samples(draft)


def _input_ids(draft: Draft) -> Tensor:
    """Token ids [batch, tokens]; several code books stand behind each other along the batch (MusicGen) or in a last
    dimension (Dia, Kyutai)."""
    config = draft.config
    kind = config.model_type
    if kind.startswith("musicgen") and kind.endswith("decoder"):
        return draft.text(draft.size * config.num_codebooks, draft.length)
    if kind in ("dia_decoder", "kyutai_speech_to_text", "csm"):
        books = getattr(config, "num_channels", None) or config.num_codebooks + (kind != "csm")
        return draft.integers(40, draft.size, draft.length, books)
    return draft.text(draft.size, draft.length)


def _decoder_ids(draft: Draft, length: int) -> Tensor:
    """Token ids [batch, tokens] of the decoder; of the first codebook's size where it has several (MusicGen)."""
    decoder: Any = getattr(draft.config, "decoder", None) or getattr(draft.config, "decoder_config", None)
    books = getattr(decoder, "num_codebooks", None)
    if isinstance(books, int) and books > 1:
        return draft.integers(decoder.vocab_size - 1, draft.size * books, length)
    if draft.config.model_type == "dia":
        return draft.integers(40, draft.size, length, draft.config.decoder_config.num_channels)
    return draft.text(draft.size, length)


def _has_videos(model: nn.Module, config: Any) -> bool:
    """Whether frames of a video go through a branch of their own."""
    return getattr(config, "video_config", None) is not None and "pixel_values" not in parameters_of(model)


def _takes_text(model: nn.Module, config: Any) -> bool:
    """Whether input_ids is a real input (some decoders in vision models list it in vain)."""
    text = text_config(config)
    known = isinstance(getattr(text, "vocab_size", None) or getattr(text, "num_hash_buckets", None), int)
    return known and model.main_input_name not in (
        "input_features",
        "input_values",
    )


_KINDS = (
    ("image", "pixel_values", (*IMAGE_TOKEN_FIELDS, "im_token_id", "image_patch_id")),
    ("audio", "input_features", ("audio_token_id", "audio_token_index")),
    ("audio", "input_values", ("audio_token_id", "audio_token_index")),
    ("video", "pixel_values_videos", ("video_token_id", "video_token_index")),
)


def _join_media_and_text(model: nn.Module, config: Any, batch: Batch) -> None:
    """Put as many placeholders into the text as the tower gives vectors (LLaVA and its kin); where that cannot be
    found out, leave the image (sound, video) out, so that the text part is traced and that part frozen."""
    import torch

    if "input_ids" not in batch:
        return
    image: int | None = None
    for kind, key, fields in _KINDS:
        token = next((t for f in fields if isinstance(t := _token(config, f), int)), None)
        if key not in batch or token is None:
            continue
        owner = _owner(model, kind)
        if owner is None and kind != "audio":
            continue  # it finds the places itself, or has other ways for images (cross-attention)
        # older models of sound put a whole recording where one placeholder stands
        count = 1 if owner is None else _vectors(model, owner, kind, batch, key)
        if count is None:
            for name in (key, *_BESIDE.get(kind, ())):
                batch.pop(name, None)
            continue
        size = batch["input_ids"].shape[0]
        places = torch.full((size, count), token, dtype=torch.long)
        batch["input_ids"] = torch.cat((places, batch["input_ids"]), dim=1)
        if "attention_mask" in batch:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        image = token if kind == "image" else image
    for name in TYPES_OF_TOKENS & parameters_of(model) if image is not None else ():
        batch[name] = (batch["input_ids"] == image).long()


_BESIDE = {
    "image": ("image_grid_thw", "image_sizes", "pixel_attention_mask"),
    "audio": ("input_features_mask", "feature_attention_mask", "padding_mask", "input_values_mask"),
}


def _token(config: Any, field: str) -> Any:
    """A placeholder's id, from the configuration or the part that has it."""
    parts = (getattr(config, n, None) for n in ("thinker_config", "vlm_config"))
    for part in (config, text_config(config), *parts):
        value = getattr(part, field, None)
        if isinstance(value, int):
            return value
    return None


def _owner(model: Any, kind: str) -> Any:
    """The part of a model that turns images (sounds) into vectors; None where there is none."""
    inner = getattr(model, "model", None), getattr(model, "vlm", None), getattr(model, "thinker", None)
    deeper = (getattr(m, "model", None) for m in inner)
    return next((o for o in (model, *inner, *deeper) if hasattr(o, f"get_{kind}_features")), None)


def _vectors(model: Any, owner: Any, kind: str, batch: Batch, key: str) -> int | None:
    """Number of vectors per image (sound), from one run of the tower; None where it wants other inputs."""
    import torch

    call = getattr(owner, f"get_{kind}_features")
    accepted = list(inspect.signature(call).parameters)
    device = next(model.parameters()).device
    # its first argument is the pixels or sound, whatever it is called
    given = {k: batch[k] for k in accepted if k in batch}
    given.pop("input_ids", None)
    given.pop("attention_mask", None)
    if "args" in accepted:
        given |= {k: batch[k] for k in _BESIDE.get(kind, ()) if k in batch}
    given.pop(key, None)
    given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    found = None
    value = batch[key]
    # one image each, or several
    for variant in (value, *(torch.stack([value] * n, 1) for n in (1, 2, 3) if kind == "image")):
        try:
            with torch.no_grad():
                found = call(variant.to(device), **given)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
            continue
        batch[key] = variant
        break
    if found is None:
        return None
    padded = getattr(owner.config, "audio_soft_tokens_per_image", None)
    if kind == "audio" and isinstance(padded, int):
        return padded  # whatever the length of the sound (Gemma 3n)
    found = getattr(found, "pooler_output", found) if getattr(found, "pooler_output", None) is not None else found
    found = getattr(found, "last_hidden_state", found)
    if isinstance(found, (list, tuple)):
        found = torch.cat([f.reshape(-1, f.shape[-1]) for f in found])
    if kind == "audio" and found.shape[-1] != model.get_input_embeddings().weight.shape[-1]:
        return None  # parts of a default configuration that do not fit together
    rows = found.numel() // found.shape[-1]
    size = batch["input_ids"].shape[0]
    return rows // size if rows % size == 0 else None


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
