"""Mixtures of experts made of dense decoders whose layers are the same but for the router and the experts.

Llama's and Mistral's make a Mixtral, a DeepSeek-MoE (with one shared expert, or none) or a Qwen2-MoE; Qwen2's a
Qwen2-MoE, and Qwen3's a Qwen3-MoE."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mergeid.plugins import Batch, MergeidError, Mixture, MixtureRequest, MixtureTensor

if TYPE_CHECKING:
    from torch import Tensor, nn

EMBEDDING = "model.embed_tokens.weight"
_MLP = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate_proj|down_proj|up_proj)\.weight")
_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters", "attention_dropout", "torch_dtype", "dtype", "transformers_version",
)  # fmt: skip
"""Fields that mean the same in all these configs."""
_WINDOWS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
"""Fields of Qwen's alone."""
_REMOTE = "deepseek-ai/deepseek-moe-16b-base--"
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """A mixture of experts.

    Attributes:
        name: what recipes call it.
        dense: types of the models that it is made of.
        told: (config of the dense model, what is asked for) -> what its config says besides what it takes over.
        block: where routers and experts lie in a layer.
        weights: the expert's names for a dense model's weights, where they are others.
        shared: the least and most shared experts.
        shared_block: where they lie.
        shared_gate: their router; empty: they have none.
        biased: whether queries, keys and values have biases.
        plain: whether it has neither scaled rotary positions nor sliding windows, as some dense models have.
        note: what the user should know of it.
    """

    name: str
    dense: tuple[str, ...]
    told: Callable[[Config, MixtureRequest], dict[str, Any]]
    block: str = "mlp"
    weights: Mapping[str, str] = field(default_factory=dict)
    shared: tuple[int, int] = (0, 0)
    shared_block: str = ""
    shared_gate: str = ""
    biased: bool = False
    plain: bool = False
    note: str = ""


def _mixtral(config: Config, asked: MixtureRequest) -> dict[str, Any]:
    return {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": asked.experts,
        "sliding_window": config.get("sliding_window"),
    }


def _deepseek(config: Config, asked: MixtureRequest) -> dict[str, Any]:
    rotary = config.get("rope_parameters") or config
    classes = {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    }
    return {
        "model_type": "deepseek",
        "architectures": ["DeepseekForCausalLM"],
        "auto_map": {auto: f"{_REMOTE}{own}" for auto, own in classes.items()},
        "n_routed_experts": asked.experts,
        "n_shared_experts": asked.shared or None,
        "moe_intermediate_size": config["intermediate_size"],
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
        "norm_topk_prob": True,
        "rope_theta": rotary["rope_theta"],
    }


def _qwen3(config: Config, asked: MixtureRequest) -> dict[str, Any]:
    windows = {key: config.get(key) for key in _WINDOWS} if config.get("use_sliding_window") else {}
    if config["model_type"] == "mistral" and config.get("sliding_window"):  # in all layers
        windows = {
            "use_sliding_window": True,
            "sliding_window": config["sliding_window"],
            "max_window_layers": 0,
            "layer_types": ["sliding_attention"] * config["num_hidden_layers"],
        }
    return {
        **windows,
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": bool(config.get("attention_bias")),
        "num_experts": asked.experts,
        "moe_intermediate_size": config["intermediate_size"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }


def _qwen2(config: Config, asked: MixtureRequest) -> dict[str, Any]:
    return {
        **{key: value for key, value in _qwen3(config, asked).items() if key != "attention_bias"},
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "qkv_bias": True,
        "shared_expert_intermediate_size": config["intermediate_size"],
    }


KINDS = (
    Kind(
        "Mixtral",
        ("llama", "mistral"),
        _mixtral,
        block="block_sparse_moe",
        weights={"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
    ),
    Kind(
        "DeepSeek MoE",
        ("llama", "mistral"),
        _deepseek,
        shared=(0, 1),
        shared_block="shared_experts",
        plain=True,
        note="the result runs DeepSeek's own code from the hub: transformers needs trust_remote_code=True for it",
    ),
    Kind(
        "Qwen MoE",
        ("llama", "mistral", "qwen2"),
        _qwen2,
        shared=(1, 1),
        shared_block="shared_expert",
        shared_gate="shared_expert_gate",
        biased=True,
    ),
    Kind("Qwen3 MoE", ("qwen3",), _qwen3),
)
"""In the order in which they are tried."""


def mixture(config: Config, names: Sequence[str], asked: MixtureRequest) -> Mixture | None:
    """What the mixture of such models is; None where none is known.

    Raises:
        MergeidError: none can be made as it is asked for.
    """
    dense = config.get("model_type")
    if EMBEDDING not in names or not any(_MLP.fullmatch(n) for n in names):
        return None
    if all(dense not in kind.dense for kind in KINDS):
        return None
    wanted = (asked.architecture or "").lower()
    named = [kind for kind in KINDS if kind.name.lower().startswith(wanted)]
    if not named:
        listed = ", ".join(kind.name for kind in KINDS)
        raise MergeidError(f"architecture {asked.architecture!r} is not known; expected {listed}")
    whole = _whole(config)
    reasons = [_why_not(kind, whole, asked) for kind in named]
    kind = next((k for k, why in zip(named, reasons, strict=True) if not why), None)
    if kind is None:
        said = "; ".join(f"{k.name} {why}" for k, why in zip(named, reasons, strict=True))
        raise MergeidError(
            f"no mixture can be made of these {dense} models: {said}; choose other models or another --architecture"
        )
    return _made(kind, whole, names, asked)


def _whole(config: Config) -> dict[str, Any]:
    """With the defaults of its own class, which other classes do not have."""
    from transformers import AutoConfig

    rest = {k: v for k, v in config.items() if k != "model_type"}
    found: dict[str, Any] = AutoConfig.for_model(config["model_type"], **rest).to_dict()
    return found


def _why_not(kind: Kind, config: Config, asked: MixtureRequest) -> str:
    """Why this one cannot be made; empty: it can."""
    least, most = kind.shared
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaled = rotary.get("rope_type", rotary.get("type", "default")) != "default"
    if config["model_type"] not in kind.dense:
        return f"is made of {', '.join(kind.dense)}"
    if kind.dense[0] == "llama" and (config.get("attention_bias") or config.get("mlp_bias")):
        return "has no place for the biases of attention and MLPs"
    if asked.shared < least:
        return "needs one shared expert"
    if asked.shared > most:
        return "takes one shared expert at most" if most else "takes no shared experts"
    if kind.shared_gate and asked.gated is False:
        return "needs positive_prompts for its shared expert"
    if asked.shared and not kind.shared_gate and asked.gated:
        return "has no router for its shared expert; leave out its prompts"
    window = config.get("sliding_window") or math.inf
    if kind.plain and config["model_type"] == "mistral" and window < config["max_position_embeddings"]:
        return f"has no sliding windows, and these models have one of {window} tokens"
    return "does not scale rotary positions as these models do" if scaled and kind.plain else ""


def _made(kind: Kind, config: Config, names: Sequence[str], asked: MixtureRequest) -> Mixture:
    width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    groups = int(config.get("num_key_value_heads") or heads)
    told = {
        **{key: config[key] for key in _SHARED if config.get(key) is not None},
        "num_key_value_heads": groups,
        "num_experts_per_tok": asked.per_token,
        **kind.told(config, asked),
    }
    places = [f"experts.{i}" for i in range(asked.experts)] + [kind.shared_block] * asked.shared
    tensors: dict[str, MixtureTensor] = {}
    layers: set[int] = set()
    for name in names:
        found = _MLP.fullmatch(name)
        if found is None:
            tensors[name] = MixtureTensor(None, name)
            continue
        layers.add(int(found[1]))
        weight = kind.weights.get(found[2], found[2])
        for i, place in enumerate(places):
            inside = f"model.layers.{found[1]}.{kind.block}.{place}.{weight}.weight"
            tensors[inside] = MixtureTensor(i, name, ends=found[2] == "down_proj")

    def routers(name: str) -> tuple[str, ...]:
        return tuple(f"model.layers.{i}.{kind.block}.{name}.weight" for i in sorted(layers)) if name else ()

    size = int(config.get("head_dim") or width // heads)
    biases = {"q": heads, "k": groups, "v": groups} if kind.biased else {}
    zeros = {f"model.layers.{i}.self_attn.{p}_proj.bias": (n * size,) for i in layers for p, n in biases.items()}
    return Mixture(
        told,
        tensors,
        routers("gate"),
        EMBEDDING,
        width,
        routers(kind.shared_gate),
        {name: shape for name, shape in zeros.items() if name not in tensors},
        (kind.note,) if kind.note else (),
    )


def layer_inputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    """What enters each layer, [B, T, width], bottom first."""
    inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    found = model(**inputs, output_hidden_states=True, return_dict=True, use_cache=False)
    return list(found.hidden_states[:-1])
