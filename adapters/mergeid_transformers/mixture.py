"""Mixtures of experts made of dense decoders: Llama's and Mistral's become Mixtral's, whose layers are the same but for
the router and the experts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergeid.plugins import Batch, Mixture, MixtureTensor

if TYPE_CHECKING:
    from torch import Tensor, nn

DENSE = ("llama", "mistral")
EMBEDDING = "model.embed_tokens.weight"
_MLP = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate_proj|down_proj|up_proj)\.weight")
_PLACES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_theta",
    "rope_parameters", "attention_dropout", "torch_dtype", "dtype", "transformers_version",
)  # fmt: skip
"""Fields that mean the same in both configs."""


def mixture(config: Mapping[str, Any], names: Sequence[str], experts: int, per_token: int) -> Mixture | None:
    """What the mixture of so many such models is; None where none is known, or where layers have biases that Mixtral's
    lack."""
    kinds = config.get("model_type")
    if kinds not in DENSE or config.get("attention_bias") or config.get("mlp_bias") or config.get("rope_scaling"):
        return None
    made = {k: config[k] for k in _SHARED if k in config}
    heads = {"num_key_value_heads": config.get("num_key_value_heads") or config.get("num_attention_heads")}
    told = {
        **made,
        **heads,
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": experts,
        "num_experts_per_tok": per_token,
        "sliding_window": None,
    }
    tensors: dict[str, MixtureTensor] = {}
    gates: dict[int, str] = {}
    for name in names:
        found = _MLP.fullmatch(name)
        if found is None:
            tensors[name] = MixtureTensor(None, name)
            continue
        block = f"model.layers.{found[1]}.block_sparse_moe"
        gates[int(found[1])] = f"{block}.gate.weight"
        for i in range(experts):
            place = f"{block}.experts.{i}.{_PLACES[found[2]]}.weight"
            tensors[place] = MixtureTensor(i, name, ends=found[2] == "down_proj")
    if not gates or EMBEDDING not in names:
        return None
    return Mixture(told, tensors, tuple(gates[i] for i in sorted(gates)), EMBEDDING, int(config["hidden_size"]))


def layer_inputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    """What enters each layer, [B, T, width], bottom first."""
    inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    found = model(**inputs, output_hidden_states=True, return_dict=True, use_cache=False)
    return list(found.hidden_states[:-1])
