"""Which fields of two ``config.json`` files make their networks compute different things.

Both configs are read through the library's own class, so that defaults and the formats of older versions do not count.
What remains different and is not on the lists here counts: a field that nobody thought of is reported, not ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, Literal

from mergeid.plugins import ConfigDifference
from mergeid_transformers.configs import STORAGE_KEYS, library_config, model_types

RECORDS = frozenset({
    "_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "tokenizer_class", "processor_class",
    "finetuning_task", "task_specific_params", "prefix",
})  # fmt: skip
"""Where a checkpoint comes from and what belongs to it."""

EXECUTION = frozenset({
    "use_cache", "return_dict", "use_return_dict", "output_hidden_states", "output_attentions", "torchscript",
    "gradient_checkpointing", "use_gradient_checkpointing", "chunk_size_feed_forward", "pretraining_tp",
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset",
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal", "_output_attentions",
    "use_mamba_kernels", "use_bfloat16",
})  # fmt: skip
"""How the same function is computed, and what is returned beside its result."""

TRAINING = frozenset({
    "problem_type", "router_aux_loss_coef", "router_z_loss_coef", "ctc_loss_reduction", "ctc_zero_infinity",
    "mask_time_prob", "mask_time_length", "mask_time_min_masks", "mask_feature_prob", "mask_feature_length",
    "mask_feature_min_masks", "apply_spec_augment", "semantic_loss_ignore_index",
})  # fmt: skip
TRAINING_PATTERN = re.compile(
    r"dropout|pdrop$|layerdrop|^drop_path|^(attn_)?drop_rate$|^initializer_|^init(_xavier)?_std$"
)
"""Losses, masking, dropout and initial values: without effect on a trained network that is run."""

GENERATION = frozenset({
    "suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids", "forced_bos_token_id", "forced_eos_token_id",
    "bad_words_ids", "max_length", "min_length", "max_new_tokens", "do_sample", "num_beams", "num_beam_groups",
    "num_return_sequences", "early_stopping", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "diversity_penalty", "typical_p", "exponential_decay_length_penalty",
    "remove_invalid_values", "output_scores", "return_dict_in_generate",
})  # fmt: skip
"""How text is drawn from the network's outputs."""

SHAPES = frozenset({"vocab_size", "num_labels", "_num_labels", "id2label", "label2id"})
"""What the shapes of the tensors say too, and what the rows of a head mean: compared where tensors are."""

WIDTHS = frozenset({"hidden_size", "hidden_sizes", "intermediate_size", "embedding_size", "embed_dim", "dims"})
"""Widths of layers, which the shapes of the tensors say too."""

LAYOUT = frozenset({
    "max_window_layers", "use_sliding_window", "sliding_window_pattern", "_sliding_window_pattern",
    "global_attn_every_n_layers", "full_attention_interval", "no_rope_layer_interval",
})  # fmt: skip
"""Which layers attend to everything: spelled out in ``layer_types``, which counts where there is one."""

TIES = frozenset({"tie_word_embeddings"})
"""Whether the head is the embedding: compared where the heads are."""

HARMLESS = STORAGE_KEYS | RECORDS | EXECUTION | TRAINING | GENERATION | SHAPES | TIES

CLASSES = frozenset({"architectures", "auto_map"})
"""Which class is built: judged by itself."""

TOKENS = re.compile(r"(^|_)(bos|eos|pad|sep|cls|mask|unk|decoder_start)_token_id$")
"""Ids of special tokens."""
POSITIONS_FROM_PADDING = re.compile(
    r"roberta|camembert|xmod|longformer|mpnet|ibert|data2vec|esm|luke|mega|xglm|fsmt|biogpt|speech_to_text|m2m"
)
"""Model types whose positions count from the padding id."""


def is_harmless(field: str) -> bool:
    """Whether a field says nothing of what the network computes."""
    return field in HARMLESS or TRAINING_PATTERN.search(field) is not None


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[ConfigDifference]:
    """Every field that matters and differs; transformers is imported only where the files differ in one."""
    types = a.get("model_type"), b.get("model_type")
    if types[0] != types[1]:
        return [ConfigDifference("model_type", *types)]
    found = _heads(a, b)
    one, two = (_stripped(c) for c in (a, b))
    if one == two and all(a.get(k) == b.get(k) for k in TIES):  # with which some classes do more than tie
        return found
    if types[0] in model_types():
        with suppress(Exception):  # whatever a class says of values it does not know: compared as they are written
            one, two = (_normal(str(types[0]), c) for c in (a, b))
    fields = _compared(one, two)
    return [*found, *(d for d in fields if not (_only_generates(d.field, a) and _only_generates(d.field, b)))]


def adopted(config: Mapping[str, Any], other: Mapping[str, Any], *, head: bool) -> dict[str, Any]:
    """`other`'s fields, but for those that are harmless: these stay as in `config`, at every level. The class is
    `other`'s only with `head`, or where the model types differ."""
    other_class = head or config.get("model_type") != other.get("model_type")

    def own(key: str) -> bool:
        return is_harmless(key) or (key in CLASSES and not other_class)

    theirs = {k: v for k, v in other.items() if not own(k)}
    for key, value in theirs.items():
        mine = config.get(key)
        if isinstance(mine, Mapping) and isinstance(value, Mapping):
            theirs[key] = adopted(mine, value, head=head)
    return deepcopy({**theirs, **{k: v for k, v in config.items() if own(k)}})


def ties(config: Mapping[str, Any]) -> bool | None:
    """Whether the config says that the head is the embedding."""
    if config.get("model_type") not in model_types():
        stated = config.get("tie_word_embeddings")
        return stated if isinstance(stated, bool) else None
    try:
        found = getattr(library_config(str(config["model_type"]), config), "tie_word_embeddings", None)
    except Exception:  # whatever a class says of values it does not know
        return None
    return found if isinstance(found, bool) else None


def with_ties(config: Mapping[str, Any], tied: bool) -> dict[str, Any] | None:
    """The config with ``tie_word_embeddings`` set wherever it is stated; None where that changes another field too."""
    changed = _set_ties(config, tied)
    kind = str(config.get("model_type"))
    if kind in model_types() and (ties(changed) is not tied or _normal(kind, changed) != _normal(kind, config)):
        return None
    return changed


def _set_ties(config: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    found = {k: _set_ties(v, tied) if isinstance(v, Mapping) and TIES & v.keys() else v for k, v in config.items()}
    return {**found, "tie_word_embeddings": tied}


def _heads(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[ConfigDifference]:
    """Other classes, where both configs name one."""
    one, two = (class_name(c) for c in (a, b))
    return [ConfigDifference("architectures", one, two, "head")] if one and two and one != two else []


def class_name(config: Mapping[str, Any]) -> str:
    """The class that a config names, as it is called in torch; empty where it names none."""
    stated = config.get("architectures")
    name = stated[0] if isinstance(stated, list) and stated and isinstance(stated[0], str) else ""
    return name.removeprefix("TF").removeprefix("Flax")


def _stripped(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is harmless, at every level. Two configs that are equal so need no library to tell."""
    return {
        k: _stripped(v) if isinstance(v, Mapping) else v
        for k, v in config.items()
        if not is_harmless(k) and k not in CLASSES
    }


def _normal(model_type: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """All fields as the installed library reads them, those left out by default too."""
    return _with_head_dim(_plain(_stripped(library_config(model_type, config).to_dict())))


def _with_head_dim(config: Mapping[str, Any]) -> dict[str, Any]:
    """The width of a head written out where the library's code takes it from the other two numbers."""
    found = {k: _with_head_dim(v) if isinstance(v, Mapping) else v for k, v in config.items()}
    width, heads = found.get("hidden_size"), found.get("num_attention_heads")
    if found.get("head_dim") is None and isinstance(width, int) and isinstance(heads, int) and heads > 0:
        found["head_dim"] = width // heads
    return found


def _plain(value: Any) -> Any:
    """As it would be in a JSON file. The old name of a rope's kind lies beside the new one."""
    if isinstance(value, Mapping):
        old = {"type"} if "rope_type" in value else set()
        return {str(k): _plain(v) for k, v in value.items() if k not in old}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    return str(value)


def _compared(
    a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "", model_type: str | None = None
) -> list[ConfigDifference]:
    """Fields that differ; one that is missing and one that is null are the same. Tables inside of a config that are no
    configs have their own rules, so that all in them counts."""
    found: list[ConfigDifference] = []
    one, two = (c.get("model_type", model_type) for c in (a, b))
    kind = one if one == two and isinstance(one, str) else None
    for key in sorted({*a, *b}):
        x, y = a.get(key), b.get(key)
        if x == y or (key in LAYOUT and _same_layout(a, b) and kind is not None and not _code_reads(key, kind)):
            continue
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            found += _compared(x, y, f"{prefix}{key}.")
        elif kind is None or _is_read(key, kind):
            found.append(ConfigDifference(prefix + key, x, y, _effect(key, a, b)))
    return found


def _effect(key: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Literal["function", "width", "inputs"]:
    if key in WIDTHS:
        return "width"
    longest = key == "max_position_embeddings" and _by_default_rope(a) and _by_default_rope(b)
    return "inputs" if longest else "function"


def _by_default_rope(config: Mapping[str, Any]) -> bool:
    """Whether positions are rotations that do not depend on the greatest length."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping) or not rope:
        return False
    nested = [v for v in rope.values() if isinstance(v, Mapping)] or [rope]
    return all(r.get("rope_type") == "default" for r in nested)


def _only_generates(field: str, config: Mapping[str, Any]) -> bool:
    """Whether a field is a token id that steers generation alone: in decoders with a causal head whose positions do
    not count from the padding."""
    if not TOKENS.search(field):
        return False
    causal = class_name(config).endswith(("ForCausalLM", "LMHeadModel")) and not config.get("is_encoder_decoder")
    return causal and not POSITIONS_FROM_PADDING.search(str(config.get("model_type")))


@cache
def _declared(model_type: str) -> frozenset[str]:
    """Fields that the library's class itself has."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return frozenset(CONFIG_MAPPING[model_type]().to_dict())
    except Exception:  # made of other configs only, or of what is not installed
        return frozenset()


@cache
def _code(model_type: str) -> str:
    """All of the library's code that may read a config of this type while a network runs."""
    import inspect

    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    root, own = Path(transformers.__file__).parent, Path(inspect.getfile(CONFIG_MAPPING[model_type])).parent
    files = [*root.glob("modeling_*.py"), *root.glob("masking_utils.py"), *own.glob("modeling_*.py")]
    return "\n".join(f.read_text(encoding="utf-8", errors="replace") for f in files)


def _is_read(field: str, model_type: str) -> bool:
    """Whether a field can matter: the class has it, or code reads it nevertheless. Names of older versions, which the
    class turned into fields of its own, and notes of training tools are neither."""
    if model_type not in model_types() or not (known := _declared(model_type)) or field in known:
        return True
    return _code_reads(field, model_type)


def _code_reads(field: str, model_type: str) -> bool:
    """Whether the library's code takes this field from a config of this type while a network runs."""
    if model_type not in model_types():
        return True
    name, config = re.escape(field), r"[\w.]*(config|cfg)\w*"
    read = rf"{config}\.{name}\b|attr\(\s*{config},\s*[\"']{name}[\"']"
    return re.search(read, _code(model_type)) is not None


def _same_layout(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether both spell out the same kinds of layers."""
    return a.get("layer_types") is not None and a.get("layer_types") == b.get("layer_types")
