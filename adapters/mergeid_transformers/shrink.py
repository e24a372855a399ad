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
from typing import TYPE_CHECKING, Any

from mergeid_transformers.shrink_layers import (
    LAYERS,
    from_start,
    heads_of,
    hidden_of,
    indices_of,
    integer,
    integers,
    kept_layers,
    layers_of,
    tree,
)
from mergeid_transformers.shrink_names import (
    CHOSEN_NAME,
    CHUNK_NAME,
    COUNTS_NAME,
    DEPTH_NAME,
    DERIVED_NAMES,
    EXPERTS_NAME,
    HEADS_NAME,
    ID_NAME,
    IMAGE_NAME,
    INTERVAL_NAME,
    LABELS_NAME,
    LAYER_INDICES_NAME,
    MEL_NAME,
    NOT_DEPTH_NAME,
    NOT_HEADS_NAME,
    NOT_ID_NAME,
    NOT_WIDTH_NAME,
    OFFSET_NAME,
    PATCH_NAME,
    POSITIONS_NAME,
    SHARED_EXPERTS_NAME,
    VOCABULARY_NAME,
    WIDTH_NAME,
    WINDOW_NAME,
)
from mergeid_transformers.shrink_rotary import adapt_rotary
from mergeid_transformers.shrink_table import SPECIAL, WHOLE

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
POSITIONS = 96
FRAMES = 4
FEW = (
    (CHOSEN_NAME, CHOSEN),
    (SHARED_EXPERTS_NAME, 1),
    (re.compile(r"^(n_group|n_groups|mamba_n_groups|num_expert_group|mamba_ngroups)$"), 2),
    (re.compile(r"^topk_group$"), 1),
)
SMALL = (
    (INTERVAL_NAME, 2),
    (re.compile(r"^(num_frames|frames_per_clip)$"), FRAMES),
    (OFFSET_NAME, 1),
    (re.compile(r"^first_k_dense_replace$"), 1),
    (MEL_NAME, 32),
)
"""Names of numbers, and the most that each may be."""


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
        for part in tree(config):
            self._anchor(part)
        given = {k: v for k, v in vars(config).items() if not k.startswith("_")}
        if given.get("stage_names") or (config.model_type == "timm_backbone" and config.out_indices):
            given["out_indices"] = list(config.out_indices)
        base = vars(PretrainedConfig())
        content: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for name, value in given.items():
            if isinstance(value, PretrainedConfig):
                content[name] = {**self.shrink(value), "model_type": value.model_type}
            elif name in DERIVED_NAMES - {"stage_names"} or (
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
        layers = layers_of(own)
        if layers and len(names) == layers + 1:
            kept = kept_layers(own, layers)[0]
            indices = [
                kept.index(i - 1) + 1 if i - 1 in kept else 0 if i == 0 else -1 for i in from_start(indices, layers + 1)
            ]
        content["out_indices"] = list(indices)

    def _anchor(self, config: PretrainedConfig) -> None:
        """Fix the new hidden size of a configuration."""
        name, old = hidden_of(config)
        if name and old not in self.widths:
            heads = heads_of(config)
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
            name, old = hidden_of(config)
            ratio = self.widths[old] / old if name else 1 / 8
            if value <= 8:
                return value
            new = max(8, round(value * ratio / 8) * 8)
            self.widths[value] = min(new, value)
        return self.widths[value]

    # -- the fields of one configuration --------------------------------------------------------------------------

    def _fields(self, config: PretrainedConfig, own: Mapping[str, Any]) -> dict[str, Any]:
        content = {k: v for k, v in own.items() if k not in DERIVED_NAMES}
        layers = layers_of(own)
        kept, depth = kept_layers(own, layers)
        for name, value in own.items():
            if name in content:
                content[name] = self._field(config, own, name, value, layers, kept, depth)
        if config.model_type in WHOLE:
            return content
        self._heads(config, own, content)
        self._expand(own, content)
        if {"conv_output_size", "downsample_hidden_size", "feature_size"} <= content.keys():
            content["conv_output_size"] = content["downsample_hidden_size"] * -(-content["feature_size"] // 8)
        adapt_rotary(config.model_type, own, content)
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
        if config.model_type in WHOLE and not (IMAGE_NAME.search(name) or LABELS_NAME.search(name)):
            return value
        if name == "num_kv_shared_layers":
            return min(value or 0, depth // 2)
        if name == "out_indices" and config.model_type == "timm_backbone":
            return value  # of stages, which only its name tells
        if name == "num_pos_feats":
            return self.width(config, 2 * value) // 2
        if LAYER_INDICES_NAME.search(name) and not name.startswith("num") and (integer(value) or integers(value)):
            return indices_of(name, value, kept, layers, depth)
        if isinstance(value, (list, tuple)) and layers > 2 and len(value) == layers:
            item = self.width if WIDTH_NAME.search(name) and integers(value) else None
            return [item(config, value[i]) if item else self._item(config, name, value[i]) for i in kept]
        if isinstance(value, Mapping) and name in ("image_size", "patch_size", "size"):
            return {k: self._image(own, "image_size", v) if integer(v) else v for k, v in value.items()}
        if name == "backbone" and isinstance(value, str) and value.startswith("resnet"):
            return "test_resnet"
        if integers(value) and name in ("depths", "num_blocks", "stage_num_blocks", "layers", "layer_depths"):
            return [min(v, 2) for v in value]
        if integers(value) and (HEADS_NAME.search(name) and not NOT_HEADS_NAME.search(name)):
            return [max(1, 2 * v // value[0]) if value[0] > 2 else v for v in value]
        if integers(value) and WIDTH_NAME.search(name) and not NOT_WIDTH_NAME.search(name):
            return [self.width(config, v) for v in value]
        if integers(value) and (IMAGE_NAME.search(name) or PATCH_NAME.search(name)):
            return [self._image(own, name, v) for v in value]
        if integers(value) and ID_NAME.search(name) and not NOT_ID_NAME.search(name):
            return [self._id(v) for v in value]
        if not integer(value):
            return value
        return self._number(config, own, name, value, depth)

    def _item(self, config: PretrainedConfig, name: str, value: Any) -> Any:
        if integer(value) and HEADS_NAME.search(name):
            return min(value, HEADS)
        return value

    def _number(self, config: PretrainedConfig, own: Mapping[str, Any], name: str, value: int, depth: int) -> int:
        count = self._few(own, name, value, depth)
        return self._size(config, own, name, value) if count is None else count

    def _few(self, own: Mapping[str, Any], name: str, value: int, depth: int) -> int | None:
        """Heads, layers, experts and groups; None for anything else."""
        if HEADS_NAME.search(name) and not NOT_HEADS_NAME.search(name):
            return value  # with its relations, see _heads
        if name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth") and layers_of(own) in (0, value):
            return min(value, depth) if layers_of(own) else value
        if DEPTH_NAME.search(name) and not NOT_DEPTH_NAME.search(name):
            return min(value, LAYERS)
        if EXPERTS_NAME.search(name):
            return min(value, EXPERTS)
        if CHUNK_NAME.search(name) and value > 8 and "chunk_right_context" not in own:
            return 8
        return _capped(FEW, name, value)

    def _size(self, config: PretrainedConfig, own: Mapping[str, Any], name: str, value: int) -> int:
        if VOCABULARY_NAME.search(name):
            return self._vocabulary(value)
        if ID_NAME.search(name) and not NOT_ID_NAME.search(name):
            return self._id(value)
        if IMAGE_NAME.search(name) or PATCH_NAME.search(name):
            return self._image(own, name, value)
        if LABELS_NAME.search(name):
            return min(value, 5)
        if COUNTS_NAME.search(name):
            return self._count(own, value)
        if name == "max_2d_position_embeddings":
            return value  # places on a page, which some networks find themselves (0 to 1000)
        if POSITIONS_NAME.search(name):
            return 32 if name == "max_source_positions" and value == 1500 else min(value, POSITIONS)
        capped = _capped(SMALL, name, value)
        if capped is not None:
            return capped
        if WINDOW_NAME.search(name):
            return min(value, 8 if value > 16 else 4)
        if WIDTH_NAME.search(name) and not NOT_WIDTH_NAME.search(name):
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
        patch = patch[-1] if integers(patch) else patch
        if PATCH_NAME.search(name):
            return PATCH if value >= PATCH * 2 else value
        if integer(patch) and patch >= 2 * PATCH:
            return min(value, SIDE * PATCH)
        return min(value, IMAGE)

    def _count(self, own: Mapping[str, Any], value: int) -> int:
        """Numbers of patches follow the image; other numbers of tokens are few."""
        if value <= 8:
            return value
        image, patch = own.get("image_size"), own.get("patch_size")
        if integer(image) and integer(patch) and patch >= 2 * PATCH and value == (image // patch) ** 2:
            return SIDE**2
        return 16 if isqrt(value) ** 2 == value else 10

    # -- relations -------------------------------------------------------------------------------------------------

    def _heads(self, config: PretrainedConfig, own: Mapping[str, Any], content: dict[str, Any]) -> None:
        """Heads: at most four, key heads two where they were fewer; head_dim fills the hidden size if it did."""
        names = [n for n, v in own.items() if integer(v) and HEADS_NAME.search(n) and not NOT_HEADS_NAME.search(n)]
        families: dict[str, list[str]] = {}
        for n in names:
            kind = next((p for p in ("linear", "mamba", "encoder", "decoder", "cross", "index") if p in n), "")
            families.setdefault(kind, []).append(n)
        for family in families.values():
            most = max(own[n] for n in family)
            for n in family:
                v = own[n]
                content[n] = v if v <= 1 else min(v, HEADS) if v == most else min(v, KEY_HEADS)
        _, old = hidden_of(config)
        for n, v in own.items():
            if not integer(v) or not re.search(r"head_dim|head_size|d_head|d_kv|headdim|dim_head$|head_width", n):
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
        if not integer(hidden) or not expand:
            return
        for heads, size in (
            ("mamba_n_heads", "mamba_d_head"),
            ("num_heads", "head_dim"),
            ("mamba_num_heads", "mamba_head_dim"),
            ("n_mamba_heads", "mamba_headdim"),
        ):
            if integer(own.get(heads)) and own.get(size) not in (None, "auto"):
                content[heads] = HEADS
                content[size] = int(expand * new) // HEADS
        if integer(own.get("intermediate_size")) and own["intermediate_size"] == int(expand * hidden):
            content["intermediate_size"] = int(expand * new)


def _capped(most: Sequence[tuple[re.Pattern[str], int]], name: str, value: int) -> int | None:
    """At most what the first that matches says; None where none does."""
    return next((min(value, cap) for pattern, cap in most if pattern.search(name)), None)


def _timm(config: PretrainedConfig) -> dict[str, Any]:
    """A tower that is one of timm's models: narrower where it is a plain vision transformer."""
    content = {k: v for k, v in config.to_dict().items() if k not in ("id2label", "label2id", "num_labels")}
    if str(content.get("architecture", "")).startswith("vit_"):
        small = {"embed_dim": 64, "depth": LAYERS, "num_heads": HEADS, "img_size": 56}
        content["model_args"] = {**(content.get("model_args") or {}), **small}
    return content
