"""What a configuration says of its parts: the configurations inside it, its hidden size, heads and layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

from mergeid_transformers.shrink_names import (
    HEADS_NAME,
    HIDDEN_NAMES,
    LAYER_INDICES_NAME,
    NOT_HEADS_NAME,
    USED_LAYERS_NAME,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LAYERS = 2
"""Layers of a small model, at least."""


def integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def integers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, (list, tuple)) and bool(value) and all(integer(v) for v in value)


def tree(config: PretrainedConfig) -> list[PretrainedConfig]:
    """The configurations nested in one, then itself."""
    from transformers import PretrainedConfig

    found = [p for v in vars(config).values() if isinstance(v, PretrainedConfig) for p in tree(v)]
    return [*found, config]


def hidden_of(config: PretrainedConfig) -> tuple[str, int]:
    """Name and value of the field that holds the hidden size; ("", 0) where there is none."""
    names = ("embed_dim", *HIDDEN_NAMES) if vars(config).get("depths") else HIDDEN_NAMES
    for name in names:
        value = vars(config).get(name)
        if integer(value) and value > 0:
            return name, value
        if integers(value):
            return name, value[0]
    return "", 0


def heads_of(config: PretrainedConfig) -> list[int]:
    return [
        v
        for n, v in vars(config).items()
        if integer(v) and v > 0 and HEADS_NAME.search(n) and not NOT_HEADS_NAME.search(n)
    ]


def layers_of(own: Mapping[str, Any]) -> int:
    """Number of layers; 0 where the network counts stages."""
    if any(isinstance(own.get(n), (list, tuple)) for n in ("depths", "block_configs", "stage_num_blocks")):
        return 0
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers", "decoder_layers"):
        if integer(own.get(name)):
            return int(own[name])
    return 0


def kept_layers(own: Mapping[str, Any], layers: int) -> tuple[list[int], int]:
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
        if USED_LAYERS_NAME.search(name):
            kept |= set(numbers)
        else:
            kinds.append([i in numbers for i in range(layers)])
    names, indices = own.get("stage_names"), own.get("out_indices")
    if names and integers(indices) and len(names) == layers + 1:
        kept |= {i - 1 for i in from_start(indices, layers + 1) if i > 0}
    for k in kinds:
        kept |= {i for i in range(layers) if k[i] not in k[:i]}
    for i in range(layers):
        if len(kept) < LAYERS:
            kept.add(i)
    chosen = sorted(kept)
    shared = own.get("num_kv_shared_layers")
    if integer(shared) and shared:
        chosen += chosen
    return chosen, max(len(chosen), min(LAYERS, layers))


def from_start(indices: Sequence[int], count: int) -> list[int]:
    return [i + count if i < 0 else i for i in indices]


def _index_lists(own: Mapping[str, Any], layers: int) -> dict[str, list[int]]:
    """Fields that list some of the layers by number."""
    return {
        n: list(v)
        for n, v in own.items()
        if LAYER_INDICES_NAME.search(n) and integers(v) and layers > 2 and all(0 <= i < layers for i in v)
    }


def indices_of(name: str, value: Any, kept: Sequence[int], layers: int, depth: int) -> Any:
    """Numbers of layers in the new count."""
    if integers(value) and layers > 2 and all(0 <= i < layers for i in value):
        return [k for k, i in enumerate(kept) if i in value]
    few = depth if layers else LAYERS
    values = [value] if integer(value) else list(value)
    new = [max(v, -few) if v < 0 else min(v, few - (0 if name.endswith(("end", "end_index")) else 1)) for v in values]
    return new[0] if integer(value) else new
