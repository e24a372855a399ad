"""Models put together of others' parts: the encoder of one, the decoder of another."""

from __future__ import annotations

from collections.abc import Mapping

from mergeid.errors import MergeidError
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.derived import derived, read_from
from mergeid.io.tensors import TensorSource
from mergeid.plugins import HasModules, adapter_names, get_adapter


def modules_of(model: TensorSource, wanted: list[str]) -> dict[str, str]:
    """Tensor -> the part of the model that it belongs to.

    Raises:
        MergeidError: its parts are not those that are `wanted`.
    """
    found: Mapping[str, str] | None = None
    for name in adapter_names():
        adapter = get_adapter(name)
        if found is None and isinstance(adapter, HasModules) and model.config is not None:
            found = adapter.modules(model.config, list(model.table))
    known = sorted(set((found or {}).values()))
    if found is None or known != sorted(wanted):
        has = f"the parts {', '.join(known)}" if known else "one part alone"
        raise MergeidError(f"{model.source} has {has}, and the recipe has modules {', '.join(wanted)}")
    return dict(found)


def patched(part_of: Mapping[str, str], models: Mapping[str, Checkpoint]) -> Checkpoint:
    """One model of these parts.

    Args:
        part_of: tensor -> part.
        models: part -> the model that it comes from. Names, config and tokenizer are the first one's.

    Raises:
        MergeidError: a model that lacks a tensor of its part.
    """
    every = list(dict.fromkeys(models.values()))
    if len(every) == 1:
        return every[0]
    formed = {}
    for name in every[0].table:
        model = models[part_of[name]]
        if name not in model.table:
            raise MergeidError(f"{model.source} lacks the tensor {name!r} of its part {part_of[name]!r}")
        formed[name] = read_from(model, name)
    source = " + ".join(f"{model.source}[{part}]" for part, model in models.items())
    return derived(source, every[0], formed, parents=every)
