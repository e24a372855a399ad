"""From a ``config.json`` to the library's own configuration and model class, never running a checkpoint's code."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from mergeid.plugins import MergeidError, near_names, reason, shown

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MOST_LAYERS = 10_000
COUNTS = re.compile(r"layers?$|depths?$|blocks?$|stages?$|^n_layer|num_hidden_layers|num_.*_layers")
"""Fields that count layers."""
# A checkpoint's storage choices that say nothing of the network: we always build in float32 on plain layers.
STORAGE_KEYS = frozenset({"dtype", "torch_dtype", "quantization_config", "compression_config"})


@cache
def model_types() -> tuple[str, ...]:
    """All model types of the installed transformers (``"bert"``, ``"llama"``, …)."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]

    return tuple(sorted(CONFIG_MAPPING_NAMES))


def _without_storage(config: Any) -> Any:
    if isinstance(config, Mapping):
        return {k: _without_storage(v) for k, v in config.items() if k not in STORAGE_KEYS}
    return config


def library_config(model_type: str, config: Mapping[str, Any] | None) -> PretrainedConfig:
    """The library's configuration object, without caches and storage dtypes.

    Raises `MergeidError` for a model type that the installed transformers does not have, and for a config that
    its class refuses.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in model_types():
        if config is not None and config.get("auto_map"):
            raise MergeidError(
                f"config.json (model_type {model_type!r}) asks for its own remote code through auto_map, and "
                f"transformers {transformers.__version__} has no class of its own for it; mergeid never runs "
                "code that comes with a checkpoint, so convert the checkpoint to a native class first"
            )
        near = near_names(model_type, model_types())
        raise MergeidError(
            f"transformers {transformers.__version__} has no model type {model_type!r}"
            + (f"; near names are {', '.join(near)}" if near else "")
            + "; name another one or install a version of transformers that has it"
        )
    kind = CONFIG_MAPPING[model_type]
    _check_counts(config)
    try:
        made = kind() if config is None else kind.from_dict(_without_storage(with_floats(dict(config))))
    except Exception as error:  # every class has checks of its own, and a kind of error for them
        raise MergeidError(
            f"config.json does not describe a {model_type!r} model for transformers {transformers.__version__}: "
            f"{reason(error)}; correct it, or install the version of transformers that wrote it"
        ) from error
    for part in _parts(made):
        if hasattr(part, "use_cache"):
            part.use_cache = False
    return made


def with_floats(value: Any) -> Any:
    """The content of a config.json with the numbers that JSON lacks, which the library writes as
    ``{"__float__": "Infinity"}``."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {k: with_floats(v) for k, v in value.items()}
    return [with_floats(v) for v in value] if isinstance(value, list) else value


def _check_counts(config: Any, place: str = "") -> None:
    """Raises `MergeidError` for more layers than any network has: some classes make a list of that length first."""
    for key, value in config.items() if isinstance(config, Mapping) else ():
        if isinstance(value, Mapping):
            _check_counts(value, f"{place}{key}.")
        elif isinstance(value, int) and value > MOST_LAYERS and COUNTS.search(str(key)):
            raise MergeidError(f"config.json says {place}{key} {shown(value)}; expected at most {MOST_LAYERS:,}")


def _parts(config: PretrainedConfig) -> list[PretrainedConfig]:
    """A configuration and all configurations nested in it (text, vision, decoder, …)."""
    from transformers import PretrainedConfig

    found = [config]
    for part in vars(config).values():
        if isinstance(part, PretrainedConfig):
            found += _parts(part)
    return found


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a configuration that describes the text tower (the configuration itself where there is one)."""
    for name in ("text_config", "text_encoder", "text", "llm_config", "language_config"):
        part = getattr(config, name, None)
        if part is not None and hasattr(part, "vocab_size"):
            answer: PretrainedConfig = part
            return answer
    if not isinstance(getattr(config, "vocab_size", None), int):
        # composites of whole models, and those whose text part lies deeper
        for name in (
            "encoder",
            "encoder_config",
            "thinker_config",
            "question_encoder",
            "vlm_config",
            "model_config",
            "decoder",
        ):
            part = getattr(config, name, None)
            if part is not None and hasattr(text_config(part), "vocab_size"):
                return text_config(part)
    return config


BASE = "MODEL_MAPPING_NAMES"
# Before the causal heads: encoders have both under the same names, and are masked models as a rule.
HEADS = (
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_CTC_MAPPING_NAMES",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES",
    "MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES",
    "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES",
    "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
)


@cache
def classes_of(model_type: str, mapping: str) -> tuple[str, ...]:
    """Names of the classes that one of the library's auto mappings gives for a model type."""
    from transformers.models.auto import modeling_auto

    names = getattr(modeling_auto, mapping, {}).get(model_type, ())
    return (names,) if isinstance(names, str) else tuple(names)


@cache
def _default_classes(model_type: str) -> tuple[str, ...]:
    """Names of the library's own classes for a model type, the base model first, then its usual heads; for a type that
    no auto mapping lists (a tower of a larger model) the classes of its module that are made from its config."""
    found = dict.fromkeys(name for mapping in (BASE, *HEADS) for name in classes_of(model_type, mapping))
    return tuple(found) or tuple(_by_config(model_type))


@cache
def _by_config(model_type: str) -> dict[str, type[PreTrainedModel]]:
    """Classes with a forward pass beside the model type's configuration that are made from it, the last defined (the
    largest part) first."""
    import inspect
    from importlib import import_module
    from pathlib import Path

    import transformers
    from torch import nn
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    found: list[Any] = []
    parts: list[Any] = []
    folder = Path(inspect.getfile(kind)).parent
    for file in (*sorted(folder.glob("modeling_*.py")), *folder.glob("vision.py")):
        try:
            module = import_module(f"{kind.__module__.rpartition('.')[0]}.{file.stem}")
        except ImportError:
            continue
        found += [
            c
            for c in vars(module).values()
            if isinstance(c, type)
            and issubclass(c, transformers.PreTrainedModel)
            and c.__module__ == module.__name__
            and c.config_class is kind
            and not c.__name__.endswith("PreTrainedModel")
            and c.forward is not nn.Module.forward
        ]
        parts += [c for c in vars(module).values() if _is_part(c, kind) and c.__module__ == module.__name__]
    return {c.__name__: c for c in reversed(found or parts)}


def _is_part(found: Any, kind: type) -> bool:
    """Whether a class is a plain module named after a configuration and made from nothing else (mask decoders)."""
    import inspect

    from torch import nn

    name = kind.__name__.removesuffix("Config")
    if not (
        isinstance(found, type) and issubclass(found, nn.Module) and found.__name__ in (name, f"{name}Transformer")
    ):
        return False
    given = list(inspect.signature(found).parameters.values())
    return len(given) == 1 and given[0].annotation in (kind, kind.__name__, inspect.Parameter.empty)


def has_class(name: str) -> bool:
    """Whether transformers itself has a model class of that name."""
    import transformers

    return name.isidentifier() and isinstance(getattr(transformers, name, None), type)


def model_class(model_type: str, name: str) -> type[PreTrainedModel]:
    """The model class of that name. Raises `MergeidError` where transformers has none."""
    import transformers

    found = getattr(transformers, name, None) if name.isidentifier() else None
    if not isinstance(found, type) and model_type in model_types():
        found = _by_config(model_type).get(name)
    elif not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        found = None
    if found is None:
        known = ", ".join(_default_classes(model_type)) or "none"
        raise MergeidError(
            f"transformers {transformers.__version__} has no model class {name!r} of its own for model type "
            f"{model_type!r} (it has: {known}); mergeid never runs code that comes with a checkpoint, so name one of "
            "these in the config's architectures"
        )
    return found


def choose_class(model_type: str, config: Mapping[str, Any] | None, names: frozenset[str]) -> str:
    """The class to build: the first of ``config["architectures"]`` that transformers has, else the class whose
    tensors cover `names` best (the first with a task head where there are no names).

    Raises `MergeidError` where the config names only classes that transformers does not have.
    """
    stated = (config or {}).get("architectures")
    asked = [a for a in stated if isinstance(a, str)] if isinstance(stated, list) else []
    for name in asked:
        if has_class(name):
            return name
    known = _default_classes(model_type) if model_type in model_types() else ()
    if asked or not known:
        library_config(model_type, config)  # names the cause where the whole model type is unknown
        return model_class(model_type, asked[0] if asked else "").__name__
    if not names:
        return known[min(1, len(known) - 1)]  # a task head: without one the residual stream is the output
    return max(known, key=lambda name: _coverage(model_type, name, config, names))


def _coverage(model_type: str, name: str, config: Mapping[str, Any] | None, names: frozenset[str]) -> tuple[int, int]:
    """How many of the checkpoint's tensors a class has, and (negated) how many it has besides."""
    import torch

    with torch.device("meta"):
        model = model_class(model_type, name)(library_config(model_type, config))
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    keys = set(model.state_dict())
    both = keys & (names | {prefix + n for n in names} | {n.removeprefix(prefix) for n in names})
    return len(both), -len(keys)


PEFT_TASKS = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
"""What PEFT calls a task -> the library's table of classes for it."""


def config_for(config: Mapping[str, Any], task: str) -> dict[str, Any] | None:
    """A config of the same model type with the class for a task, or of that name; None where there is none."""
    from transformers.models.auto import modeling_auto

    kind = task
    if task in PEFT_TASKS:
        kind = getattr(modeling_auto, PEFT_TASKS[task]).get(config.get("model_type"))
    if not isinstance(kind, str) or not has_class(kind):
        return None
    return {k: v for k, v in config.items() if k != "auto_map"} | {"architectures": [kind]}


def config_with_classes(config: Mapping[str, Any], classes: int, labels: Sequence[str] | None) -> dict[str, Any]:
    """A config.json of a network with so many classes."""
    named = [f"LABEL_{i}" for i in range(classes)] if labels is None else labels
    found = {
        **config,
        "id2label": {str(i): label for i, label in enumerate(named)},
        "label2id": {label: i for i, label in enumerate(named)},
    }
    return {**found, "num_labels": classes} if "num_labels" in config else found
