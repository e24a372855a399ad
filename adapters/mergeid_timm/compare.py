"""Which parts of two timm configs make their networks compute different things.

timm has no class of configs: options are keywords of ``create_model``. So where two sets of options differ, both
networks are built without memory and their modules compared; options that leave no trace in them are harmless.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mergeid.plugins import ConfigDifference, MergeidError

if TYPE_CHECKING:
    from torch import nn

HARMLESS = frozenset({"num_classes", "num_features", "in_chans", "checkpoint_path", "pretrained", "scriptable"})
"""What the shapes of the tensors say too, and how a network was made."""
TRAINING = re.compile(r"drop(_|out|$)|_drop$|^init_|^weight_init$|^zero_init_last$|^grad_checkpointing$")
"""Dropout and initial values."""
NO_TRAITS = frozenset({"training", "p", "pretrained_cfg", "pretrained_model_args", "default_cfg"})
"""Attributes of modules that say nothing of their function."""
INPUTS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
"""How an image becomes an input."""

Build = Callable[[str, Mapping[str, Any]], "nn.Module"]


def name_of(architecture: str) -> str:
    """Without the name of the library and the tag of the weights."""
    return architecture.removeprefix("timm/").partition(".")[0]


def differences(a: Mapping[str, Any], b: Mapping[str, Any], build: Build) -> list[ConfigDifference]:
    """Every option that matters and differs.

    Args:
        build: (architecture, options) -> the network without memory."""
    names = [name_of(str(c.get("architecture"))) for c in (a, b)]
    options = [_options(c) for c in (a, b)]
    found = []
    if names[0] != names[1]:
        wider = _same(names, options, build, widths=False)
        return [ConfigDifference("architecture", names[0], names[1], "width" if wider else "function")]
    pooling = [c.get("global_pool") for c in (a, b)]
    if None not in pooling and pooling[0] != pooling[1]:
        found.append(ConfigDifference("global_pool", pooling[0], pooling[1], "head"))
    if options[0] != options[1] and not _same(names, options, build, widths=True):
        for key in sorted({*options[0], *options[1]}):
            mine, theirs = (o.get(key) for o in options)
            if mine != theirs:
                found.append(ConfigDifference(f"model_args.{key}", mine, theirs))
    facts = [_facts(c) for c in (a, b)]
    for key in INPUTS:
        mine, theirs = (f.get(key) for f in facts)
        if mine is not None and theirs is not None and mine != theirs:
            found.append(ConfigDifference(key, mine, theirs, "inputs"))
    return found


def adopted(config: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """`other`'s architecture and options with `config`'s own classes and preprocessing."""
    found = {k: v for k, v in config.items() if k not in ("architecture", "global_pool", "model_args")}
    found |= {k: other[k] for k in ("architecture", "global_pool") if k in other}
    args = {**_options(other), **{k: v for k, v in (config.get("model_args") or {}).items() if _harmless(k)}}
    return {**found, **({"model_args": args} if args else {})}


def _harmless(key: str) -> bool:
    return key in HARMLESS or TRAINING.search(key) is not None


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    given = config.get("model_args")
    return {k: v for k, v in given.items() if not _harmless(k)} if isinstance(given, Mapping) else {}


def _facts(config: Mapping[str, Any]) -> Mapping[str, Any]:
    stated = config.get("pretrained_cfg")
    return stated if isinstance(stated, Mapping) else config


def _same(names: list[str], options: list[dict[str, Any]], build: Build, *, widths: bool) -> bool:
    """Whether both give the same network, but perhaps for its widths; not so where one cannot be built."""
    try:
        one, two = (list(traits(build(n, o), widths)) for n, o in zip(names, options, strict=True))
    except MergeidError:
        return False
    return one == two


def traits(model: nn.Module, widths: bool = True) -> Iterator[Any]:
    """Every module's place, class and plain attributes, and every tensor's name and shape. Without widths whole
    numbers do not count, nor do shapes."""
    for name, module in model.named_modules():
        kept = {k: _plain(v) for k, v in vars(module).items() if not k.startswith("_") and k not in NO_TRAITS}
        kept = {k: v for k, v in kept.items() if v is not None and not _harmless(k)}
        if not widths:
            kept = {k: v for k, v in kept.items() if isinstance(v, (bool, float, str))}
        yield name, type(module), kept
    yield {k: tuple(v.shape) if widths else v.dim() for k, v in model.state_dict().items()}


def _plain(value: Any) -> Any:
    """A value that can be compared; functions by name, what is neither not at all."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    name = getattr(value, "__qualname__", None)
    return name if callable(value) and isinstance(name, str) else None
