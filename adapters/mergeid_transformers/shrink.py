"""A small configuration of the same architecture: the same code with fewer layers, narrower and with fewer experts.

A neuron graph found on it shows the structure of the large model, so a model that does not fit this machine is verified
on its shrunken configuration. Numbers are recognised by the names of their fields and mapped by value: two fields of
the whole tree (text, vision, audio, …) that hold one width hold one width afterwards, since one part's output is
another's input. Of every kind of layer at least one remains.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import isqrt
from typing import TYPE_CHECKING, Any, TypeGuard

from mergeid_transformers.shrink_table import SECTIONS, SPECIAL, WHOLE

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WIDTHS = (64, 48, 80, 96, 112, 128)
"""New hidden sizes in the order in which distinct old ones are met: multiples of 16, for four heads of rotary pairs."""
HEADS, KEY_HEADS, EXPERTS, CHOSEN = 4, 2, 4, 2
SIDE = 8
"""Patches along each side of an image."""
PATCH = 4
IMAGE = 64
"""Image side of networks without patches."""
VOCABULARIES = (99, 101, 103, 107, 109, 113)
LAYERS = 2
POSITIONS = 96
FRAMES = 4

_HIDDEN = (
    *("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "hidden_dim", "encoder_hidden_dim", "width", "emb_dim"),
    *("attention_hidden_size", "embed_dims", "hidden_sizes", "neck_hidden_sizes", "encoder_hidden_size", "d_latents"),
    *("decoder_hidden_size", "base_channels", "num_filters", "codebook_dim", "conv_dim", "channels", "embedding_size"),
)
_HEADS = re.compile(r"(^|_)(n_?heads?|num_heads?|attention_heads|heads|num_attention_heads_per_layer|kv_n_heads)$")
_NOT_HEADS = re.compile(r"head_dim|head_size|layers|dim_head")
_DEPTH = re.compile(
    r"(^|_)(n_?layers?|n_layer|layers|depth|num_blocks|num_layers_per_stack|num_res_blocks|blocks_per_stage)$"
)
_NOT_DEPTH = re.compile(r"window_layers|feat|drop|_at_|proj_layers|prompt_layers|nextn|mtp|skip|shared_layers|vision_")
_EXPERTS = re.compile(
    r"(^|_)(n_routed_experts|num_local_experts|num_experts|moe_num_experts|n_experts|zero_expert_num)$"
)
_CHOSEN = re.compile(
    r"(experts_per_tok|moe_topk|moe_k|top_k_experts|moe_top_k|topk|num_selects|num_experts_per_token)$"
)
_SHARED_EXPERTS = re.compile(r"(n_shared_experts|num_shared_experts|moe_num_shared_experts)$")
_VOCABULARY = re.compile(
    r"(vocab_size|vocabulary_size|codebook_size|num_hash_buckets|vocab|num_embeds|num_embeddings|vocab_size_per_layer_input)$"
)
_ID = re.compile(
    r"(token_id|token_index|token_ids|token_idx|[a-z]_id|_ids|_bos_id|begin_suppress_tokens|suppress_tokens)$"
)
_NOT_ID = re.compile(r"layer|gradient|hook|prompt_id")
_IMAGE = re.compile(r"(^|_)(image_size|img_size|input_image_size|pretrain_image_size|crop_size|image_resolution)$")
_PATCH = re.compile(r"(^|_)patch_size$")
_POSITIONS = re.compile(
    r"(max_.*positions?(_embeddings)?|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length|context_length|"
    r"model_max_length|max_encoder_position_embeddings|max_text_len|max_ep_len|text_encoder_context_length|position_embedding_size)$"
)
_COUNTS = re.compile(
    r"(num_patches|num_position_embeddings|image_seq_length|image_seq_len|tokens_per_image|num_image_tokens|"
    r"soft_tokens_per_image|image_token_num|num_latents|latent_query_num|query_num|num_queries|num_query_tokens|"
    r"num_object_queries|num_detection_tokens|resampler_n_latents|num_global_tokens|num_landmarks|num_proposals)$"
)
_DERIVED = frozenset(
    {"stage_names", "out_features", "ignore_keys_at_rope_validation", "down_ops"}
    | {"dim_bbox_sinusoid_emb_2d", "dim_bbox_sinusoid_emb_1d", "dim_bbox_projection", "image_embedding_size"}
)
_INTERVAL = re.compile(
    r"(_interval|_period|_frequency|_freq|_every_n_layers|_step|_pattern|_layer_step|sparse_step|layer_group_size)$"
)
_OFFSET = re.compile(r"_layer_offset$")
_LAYER_INDICES = re.compile(
    r"(out_indices|block_indexes|attn_indexes|visual_indexes|layer_ids?|layers_indices|_indices|_idxs|feature_layer|"
    r"feature_layers|hook_ids|layer_indices|moe_layers|cross_attention_layers|select_layer|target_layers|"
    r"extract_layers|vision_layer|proj_layers|source_layers|scaling_layers|layer_index|layer_index_start|"
    r"layer_index_end|layer_start_index|layer_end_index|hidden_layer|subsample_layers|only_layers|fullatt_block)$"
)
_USED_LAYERS = re.compile(
    r"out_indices|hook_ids|layers_indices|extract_layers|feature_layers|state_indices|target_layers"
)
_WINDOW = re.compile(
    r"(sliding_window|attention_window|attention_window_size|local_attention|window_size|sliding_window_size)$"
)
_CHUNK = re.compile(
    r"^(chunk_size|block_size|index_topk|mamba_chunk_size|mamba_chunk_length|lsh_attn_chunk_length|"
    r"local_attn_chunk_length|conv_chunksize|chunk_length)$"
)
_MEL = re.compile(
    r"(num_mel_bins|n_mel_bins|input_feat_per_channel|input_feat_size|num_mel_channels|feature_size|model_in_dim)$"
)
_LABELS = re.compile(r"(num_labels|num_classes|num_qa_labels|num_object_labels|num_attr_labels|num_ctc_classes)$")
_WIDTH = re.compile(
    r"(size|dim|dims|width|channels?|inner|units|sizes|rank|features|ffn|d_[a-z]+|dff|d_ff|features_sizes|inplanes|"
    r"filters|embed_dims|hidden_dims|out_channel|n_inner|d_ssm|kv_channels|_planes|d_state|dim_base|dim_feedforward|"
    r"attn_unit_dims|bottleneck|n_embd|upsample_groups|hidden_dimension|hidden_size_global|hidden_size_per_layer_input|_per_stage|channel_list|"
    r"pooler_output_size|pooler_hidden_size|in_features|out_features_size)(_mlp|_2d|_1d)?$"
)
_NOT_WIDTH = re.compile(
    r"kernel|stride|chunk|batch|step|vocab|window|image|patch|max_|merge|num_channels|temporal|(?<!_)pool_|pooling|block|conv_size|"
    r"^in_channels$|^out_channels$|audio_channels|num_mel|spatial|frame|cluster|type|crop|(?<!upsample_)groups|min_|scale|eval|"
    r"^input_size$|in_chans|tubelet|grid|position_embedding_size|codebook_size|query|init(?!ial)|logit|pos_emb|final_size"
)


def shrunken(config: PretrainedConfig | Mapping[str, Any]) -> PretrainedConfig:
    """The configuration of a small model with the same layers as `config`'s.

    Args:
        config: the library's configuration, or the content of a config.json with its ``model_type``.

    Returns:
        a new configuration of the same class: hidden sizes of `WIDTHS`, at most four heads and four experts, short
        vocabularies and small images, and as few layers as show every kind of layer (two at least).

    Raises `MergeidError` where the library does not know the model type or refuses the shrunken configuration.
    """
    from mergeid_transformers.configs import library_config

    made = library_config(str(config["model_type"]), config) if isinstance(config, Mapping) else config
    content = Shrinker().shrink(made)
    content["model_type"] = made.model_type
    return library_config(made.model_type, content)


def _integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _integers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, (list, tuple)) and bool(value) and all(_integer(v) for v in value)


class Shrinker:
    """One walk over a tree of configurations, with the numbers mapped so far."""

    def __init__(self) -> None:
        self.widths: dict[int, int] = {}
        self.hidden: dict[int, int] = {}
        self.vocabularies: dict[int, int] = {}
        self.ids: dict[int, int] = {}
        self.counts: dict[int, int] = {}

    def shrink(self, config: PretrainedConfig) -> dict[str, Any]:
        """The content of the shrunken configuration."""
        from transformers import PretrainedConfig

        if config.model_type == "timm_wrapper":
            return _timm(config)
        for part in _tree(config):
            self._anchor(part)
        given = {k: v for k, v in vars(config).items() if not k.startswith("_")}
        if given.get("stage_names"):
            given["out_indices"] = list(config.out_indices)
        base = vars(PretrainedConfig())
        content: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for name, value in given.items():
            if isinstance(value, PretrainedConfig):
                content[name] = {**self.shrink(value), "model_type": value.model_type}
            elif name in _DERIVED - {"stage_names"} or (
                name in base and base[name] == value and name not in ("num_labels", "is_decoder")
            ):
                continue
            elif name not in ("transformers_version", "architectures", "dtype", "torch_dtype", "label2id", "id2label"):
                own[name] = value
        content.update(self._fields(config, own))
        if len(getattr(config, "id2label", None) or ()) > 5:
            content["num_labels"] = 5
        self._stages(config, own, content)
        text, vision = content.get("text_config"), content.get("vision_config")
        pinpoints = content.get("image_grid_pinpoints")
        if isinstance(pinpoints, (list, tuple)) and pinpoints and isinstance(vision, dict) and vision.get("image_size"):
            old, new = config.vision_config.image_size, vision["image_size"]
            content["image_grid_pinpoints"] = [[side * new // old for side in p] for p in pinpoints]
        if isinstance(text, Mapping) and isinstance(vision, dict) and "out_hidden_size" in vision:
            vision["out_hidden_size"] = text.get("hidden_size", vision["out_hidden_size"])
        if isinstance(text, Mapping) and isinstance(vision, dict) and vision.get("model_type") == "qwen2_vl_vision":
            vision["hidden_size"] = text["hidden_size"]
        special = SPECIAL.get(config.model_type, {})
        return {k: v for k, v in {**content, **special}.items() if v is not None or special.get(k, v) is None}

    def _stages(self, config: PretrainedConfig, own: Mapping[str, Any], content: dict[str, Any]) -> None:
        """Backbones: `out_indices` count stages after the stem, which are layers in transformers."""
        indices, names = getattr(config, "out_indices", None), vars(config).get("stage_names")
        if not indices or not names:
            return
        layers = _layers(own)
        if layers and len(names) == layers + 1:
            kept = _kept_layers(own, layers)[0]
            indices = [
                kept.index(i - 1) + 1 if i - 1 in kept else 0 if i == 0 else -1
                for i in _from_start(indices, layers + 1)
            ]
        content["out_indices"] = list(indices)

    def _anchor(self, config: PretrainedConfig) -> None:
        """Fix the new hidden size of a configuration."""
        name, old = _hidden(config)
        if name and old not in self.widths:
            heads = _heads(config)
            taken = set(self.widths.values())
            new = next((w for w in WIDTHS if w not in taken), WIDTHS[-1])
            if isinstance(getattr(config, name), (list, tuple)) or vars(config).get("depths"):
                new = 16
            if vars(config).get("embed_dim_per_stage"):
                new = 16
            self.widths[old] = new if old > 8 else old
            if heads and old % max(heads) == 0 and not isinstance(getattr(config, name), (list, tuple)):
                self.hidden[old] = new

    def width(self, config: PretrainedConfig, value: int) -> int:
        """A width in proportion to the configuration's hidden size, the same for the same value."""
        if value not in self.widths:
            name, old = _hidden(config)
            ratio = self.widths[old] / old if name else 1 / 8
            if value <= 8:
                return value
            new = max(8, round(value * ratio / 8) * 8)
            self.widths[value] = min(new, value)
        return self.widths[value]

    # -- the fields of one configuration --------------------------------------------------------------------------

    def _fields(self, config: PretrainedConfig, own: Mapping[str, Any]) -> dict[str, Any]:
        content = {k: v for k, v in own.items() if k not in _DERIVED}
        layers = _layers(own)
        kept, depth = _kept_layers(own, layers)
        for name, value in own.items():
            if name in content:
                content[name] = self._field(config, own, name, value, layers, kept, depth)
        if config.model_type in WHOLE:
            return content
        self._heads(config, own, content)
        self._expand(own, content)
        if {"conv_output_size", "downsample_hidden_size", "feature_size"} <= content.keys():
            content["conv_output_size"] = content["downsample_hidden_size"] * -(-content["feature_size"] // 8)
        self._rotary(config.model_type, own, content)
        return content

    def _field(
        self,
        config: PretrainedConfig,
        own: Mapping[str, Any],
        name: str,
        value: Any,
        layers: int,
        kept: Sequence[int],
        depth: int,
    ) -> Any:
        if config.model_type in WHOLE and not (_IMAGE.search(name) or _LABELS.search(name)):
            return value
        if name == "num_kv_shared_layers":
            return min(value or 0, depth // 2)
        if name == "num_pos_feats":
            return self.width(config, 2 * value) // 2
        if _LAYER_INDICES.search(name) and not name.startswith("num") and (_integer(value) or _integers(value)):
            return _indices(name, value, kept, layers, depth)
        if isinstance(value, (list, tuple)) and layers > 2 and len(value) == layers:
            item = self.width if _WIDTH.search(name) and _integers(value) else None
            return [item(config, value[i]) if item else self._item(config, name, value[i]) for i in kept]
        if isinstance(value, Mapping) and name in ("image_size", "patch_size", "size"):
            return {k: self._image(own, "image_size", v) if _integer(v) else v for k, v in value.items()}
        if name == "backbone" and isinstance(value, str) and value.startswith("resnet"):
            return "test_resnet"
        if _integers(value) and name in ("depths", "num_blocks", "stage_num_blocks", "layers", "layer_depths"):
            return [min(v, 2) for v in value]
        if _integers(value) and (_HEADS.search(name) and not _NOT_HEADS.search(name)):
            return [max(1, 2 * v // value[0]) if value[0] > 2 else v for v in value]
        if _integers(value) and _WIDTH.search(name) and not _NOT_WIDTH.search(name):
            return [self.width(config, v) for v in value]
        if _integers(value) and (_IMAGE.search(name) or _PATCH.search(name)):
            return [self._image(own, name, v) for v in value]
        if _integers(value) and _ID.search(name) and not _NOT_ID.search(name):
            return [self._id(v) for v in value]
        if not _integer(value):
            return value
        return self._number(config, own, name, value, depth)

    def _item(self, config: PretrainedConfig, name: str, value: Any) -> Any:
        if _integer(value) and _HEADS.search(name):
            return min(value, HEADS)
        return value

    def _number(self, config: PretrainedConfig, own: Mapping[str, Any], name: str, value: int, depth: int) -> int:
        if _HEADS.search(name) and not _NOT_HEADS.search(name):
            return value  # with its relations, see _heads
        if name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth") and _layers(own) in (0, value):
            return min(value, depth) if _layers(own) else value
        if _DEPTH.search(name) and not _NOT_DEPTH.search(name):
            return min(value, LAYERS)
        if _EXPERTS.search(name):
            return min(value, EXPERTS)
        if _CHUNK.search(name) and value > 8 and "chunk_right_context" not in own:
            return 8
        if _CHOSEN.search(name):
            return min(value, CHOSEN)
        if _SHARED_EXPERTS.search(name):
            return min(value, 1)
        if name in ("n_group", "n_groups", "mamba_n_groups", "num_expert_group", "mamba_ngroups"):
            return min(value, 2)
        if name == "topk_group":
            return min(value, 1)
        if _VOCABULARY.search(name):
            return self._vocabulary(value)
        if _ID.search(name) and not _NOT_ID.search(name):
            return self._id(value)
        if _IMAGE.search(name) or _PATCH.search(name):
            return self._image(own, name, value)
        if _LABELS.search(name):
            return min(value, 5)
        if _COUNTS.search(name):
            return self._count(own, value)
        if _POSITIONS.search(name):
            return 32 if name == "max_source_positions" and value == 1500 else min(value, POSITIONS)
        if _INTERVAL.search(name):
            return min(value, 2)
        if name in ("num_frames", "frames_per_clip"):
            return min(value, FRAMES)
        if _OFFSET.search(name):
            return min(value, 1)
        if name == "first_k_dense_replace":
            return min(value, 1)
        if _MEL.search(name):
            return min(value, 32)
        if _WINDOW.search(name):
            return min(value, 8 if value > 16 else 4)
        if _WIDTH.search(name) and not _NOT_WIDTH.search(name):
            return self.width(config, value)
        if name in ("num_conv_pos_embeddings", "max_length"):
            return min(value, 16 if name.startswith("num") else 64)
        if name in ("num_conv_pos_embedding_groups", "norm_num_groups") or name.endswith("num_groups"):
            return min(value, 4)
        return value

    def _vocabulary(self, value: int) -> int:
        if value <= VOCABULARIES[0]:
            return value
        if value & (value - 1) == 0 and value < 2**16:
            return 128  # code books
        if value not in self.vocabularies:
            self.vocabularies[value] = VOCABULARIES[min(len(self.vocabularies), len(VOCABULARIES) - 1)]
        return self.vocabularies[value]

    def _id(self, value: int) -> int:
        """Small ids stay; the others take the last places of the smallest vocabulary."""
        if value < 40:
            return value
        if value not in self.ids:
            self.ids[value] = VOCABULARIES[0] - 1 - len(self.ids)
        return self.ids[value]

    def _image(self, own: Mapping[str, Any], name: str, value: int) -> int:
        patch = own.get("patch_size")
        patch = patch[-1] if _integers(patch) else patch
        if _PATCH.search(name):
            return PATCH if value >= PATCH * 2 else value
        if _integer(patch) and patch >= 2 * PATCH:
            return min(value, SIDE * PATCH)
        return min(value, IMAGE)

    def _count(self, own: Mapping[str, Any], value: int) -> int:
        """Numbers of patches follow the image; other numbers of tokens are few."""
        if value <= 8:
            return value
        image, patch = own.get("image_size"), own.get("patch_size")
        if _integer(image) and _integer(patch) and patch >= 2 * PATCH and value == (image // patch) ** 2:
            return SIDE**2
        return 16 if isqrt(value) ** 2 == value else 10

    # -- relations -------------------------------------------------------------------------------------------------

    def _heads(self, config: PretrainedConfig, own: Mapping[str, Any], content: dict[str, Any]) -> None:
        """Heads: at most four, key heads two where they were fewer; head_dim fills the hidden size if it did."""
        names = [n for n, v in own.items() if _integer(v) and _HEADS.search(n) and not _NOT_HEADS.search(n)]
        families: dict[str, list[str]] = {}
        for n in names:
            kind = next((p for p in ("linear", "mamba", "encoder", "decoder", "cross", "index") if p in n), "")
            families.setdefault(kind, []).append(n)
        for family in families.values():
            most = max(own[n] for n in family)
            for n in family:
                v = own[n]
                content[n] = v if v <= 1 else min(v, HEADS) if v == most else min(v, KEY_HEADS)
        _, old = _hidden(config)
        for n, v in own.items():
            if not _integer(v) or not re.search(r"head_dim|head_size|d_head|d_kv|headdim|dim_head$|head_width", n):
                continue
            count = next((own[h] for h in names if v * own[h] == old), None)
            if count:
                content[n] = self.widths[old] // min(count, HEADS) if count > 1 else self.widths[old]
            elif v > 8:
                content[n] = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 16}.get(n, 24)
        if own.get("head_dim") is not None and own["head_dim"] == own.get("qk_rope_head_dim"):
            content["head_dim"] = content["qk_rope_head_dim"]
        if "qk_head_dim" in own and "qk_rope_head_dim" in content:
            content["qk_head_dim"] = content["qk_rope_head_dim"] + content["qk_nope_head_dim"]

    def _expand(self, own: Mapping[str, Any], content: dict[str, Any]) -> None:
        """State-space models: heads · head_dim = expand · hidden."""
        expand = own.get("expand", own.get("mamba_expand"))
        hidden, new = own.get("hidden_size", own.get("d_model")), content.get("hidden_size", content.get("d_model"))
        if not _integer(hidden) or not expand:
            return
        for heads, size in (
            ("mamba_n_heads", "mamba_d_head"),
            ("num_heads", "head_dim"),
            ("mamba_num_heads", "mamba_head_dim"),
            ("n_mamba_heads", "mamba_headdim"),
        ):
            if _integer(own.get(heads)) and own.get(size) not in (None, "auto"):
                content[heads] = HEADS
                content[size] = int(expand * new) // HEADS
        if _integer(own.get("intermediate_size")) and own["intermediate_size"] == int(expand * hidden):
            content["intermediate_size"] = int(expand * new)

    def _rotary(self, model_type: str, own: Mapping[str, Any], content: dict[str, Any]) -> None:
        heads = content.get("num_attention_heads") or content.get("n_head") or content.get("num_heads")
        hidden = content.get("hidden_size") or content.get("d_model") or content.get("n_embd")
        size = content.get("head_dim") or (hidden // heads if _integer(hidden) and _integer(heads) and heads else None)
        size = content.get("qk_rope_head_dim") or size
        for name in ("rope_parameters", "rope_scaling"):
            if isinstance(own.get(name), Mapping) and size:
                rope = dict(own[name])
                if model_type in SECTIONS:
                    rope.setdefault("mrope_section", SECTIONS[model_type])
                content[name] = _sections(rope, int(size * float(own.get("partial_rotary_factor") or 1.0)))


def _timm(config: PretrainedConfig) -> dict[str, Any]:
    """A tower that is one of timm's models: narrower where it is a plain vision transformer."""
    content = {k: v for k, v in config.to_dict().items() if k not in ("id2label", "label2id", "num_labels")}
    if str(content.get("architecture", "")).startswith("vit_"):
        small = {"embed_dim": 64, "depth": LAYERS, "num_heads": HEADS, "img_size": 56}
        content["model_args"] = {**(content.get("model_args") or {}), **small}
    return content


def _sections(rope: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Rotary parameters whose sections and factors fit `size` rotated dimensions."""
    new = dict(rope)
    for name, value in rope.items():
        if isinstance(value, Mapping):
            new[name] = _sections(value, size)
    size = int(size * float(rope.get("partial_rotary_factor") or 1.0))
    pairs = size // 2
    for name in ("short_factor", "long_factor"):
        if isinstance(rope.get(name), (list, tuple)):
            new[name] = list(rope[name])[:pairs]
    old = rope.get("mrope_section")
    if _integers(old):
        parts = [pairs * v // sum(old) for v in old]
        parts[old.index(min(old))] += pairs - sum(parts)
        new["mrope_section"] = parts
    return new


def _tree(config: PretrainedConfig) -> list[PretrainedConfig]:
    """The configurations nested in one, then itself."""
    from transformers import PretrainedConfig

    found = [p for v in vars(config).values() if isinstance(v, PretrainedConfig) for p in _tree(v)]
    return [*found, config]


def _hidden(config: PretrainedConfig) -> tuple[str, int]:
    """Name and value of the field that holds the hidden size; ("", 0) where there is none."""
    names = ("embed_dim", *_HIDDEN) if vars(config).get("depths") else _HIDDEN
    for name in names:
        value = vars(config).get(name)
        if _integer(value) and value > 0:
            return name, value
        if _integers(value):
            return name, value[0]
    return "", 0


def _heads(config: PretrainedConfig) -> list[int]:
    return [
        v for n, v in vars(config).items() if _integer(v) and v > 0 and _HEADS.search(n) and not _NOT_HEADS.search(n)
    ]


def _layers(own: Mapping[str, Any]) -> int:
    """Number of layers; 0 where the network counts stages."""
    if any(isinstance(own.get(n), (list, tuple)) for n in ("depths", "block_configs", "stage_num_blocks")):
        return 0
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers", "decoder_layers"):
        if _integer(own.get(name)):
            return int(own[name])
    return 0


def _kept_layers(own: Mapping[str, Any], layers: int) -> tuple[list[int], int]:
    """The layers that show every kind of layer, and their number. A kind is a name in a list of layer types, or being
    in a list of layer numbers or not; layers whose outputs are used are all kept."""
    kinds: list[list[Any]] = [
        list(v)
        for v in own.values()
        if isinstance(v, (list, tuple))
        and len(v) == layers
        and layers > 2
        and all(isinstance(x, (str, bool)) for x in v)
    ]
    kept: set[int] = set()
    for name, numbers in _index_lists(own, layers).items():
        if _USED_LAYERS.search(name):
            kept |= set(numbers)
        else:
            kinds.append([i in numbers for i in range(layers)])
    names, indices = own.get("stage_names"), own.get("out_indices")
    if names and _integers(indices) and len(names) == layers + 1:
        kept |= {i - 1 for i in _from_start(indices, layers + 1) if i > 0}
    for k in kinds:
        kept |= {i for i in range(layers) if k[i] not in k[:i]}
    for i in range(layers):
        if len(kept) < LAYERS:
            kept.add(i)
    chosen = sorted(kept)
    shared = own.get("num_kv_shared_layers")
    if _integer(shared) and shared:
        chosen += chosen
    return chosen, max(len(chosen), min(LAYERS, layers))


def _from_start(indices: Sequence[int], count: int) -> list[int]:
    return [i + count if i < 0 else i for i in indices]


def _index_lists(own: Mapping[str, Any], layers: int) -> dict[str, list[int]]:
    """Fields that list some of the layers by number."""
    return {
        n: list(v)
        for n, v in own.items()
        if _LAYER_INDICES.search(n) and _integers(v) and layers > 2 and all(0 <= i < layers for i in v)
    }


def _indices(name: str, value: Any, kept: Sequence[int], layers: int, depth: int) -> Any:
    """Numbers of layers in the new count."""
    if _integers(value) and layers > 2 and all(0 <= i < layers for i in value):
        return [k for k, i in enumerate(kept) if i in value]
    few = depth if layers else LAYERS
    values = [value] if _integer(value) else list(value)
    new = [max(v, -few) if v < 0 else min(v, few - (0 if name.endswith(("end", "end_index")) else 1)) for v in values]
    return new[0] if _integer(value) else new
