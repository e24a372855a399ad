"""Models stacked from slices of others' layers, as mergekit's recipes have them.

An output slice takes the same number of layers from each of its sources; the slices come one after the other. Seen by
position, the sources are whole models again: the first sources of all slices are one stack, the second sources another.
So a recipe with slices is a merge of stacks, each a `Derived` checkpoint whose layers are others' under new numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mergeid.errors import MergeidError
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.derived import Derived, Formed, derived, read_from
from mergeid.io.tensors import TensorSource

_NUMBERED = re.compile(r"^(.*?)\.(\d{1,6})\.(.+)$")
_LAYER_COUNT = re.compile(r"(^|_)n(um)?(_.*)?_?layers?$")
"""Keys of a config that say how many layers there are: ``num_hidden_layers``, ``n_layer``, ``num_layers``."""


@dataclass(frozen=True)
class Slice:
    """Layers ``first`` to ``end`` (not included) of a model."""

    model: Checkpoint
    first: int
    end: int

    def __len__(self) -> int:
        return self.end - self.first


@dataclass(frozen=True)
class Layers:
    """Where a model's layers are among its tensors.

    Attributes:
        prefix: what stands before the number (``model.layers``).
        count: how many there are.
    """

    prefix: str
    count: int

    def split(self, name: str) -> tuple[int, str] | None:
        """(layer, rest of the name); None outside of the layers."""
        match = _NUMBERED.match(name)
        return (int(match[2]), match[3]) if match and match[1] == self.prefix else None


def layers_of(model: TensorSource) -> Layers:
    """The one list of layers that a model has, read off the names of its tensors.

    Raises:
        MergeidError: it has none, or several of which none is the main one.
    """
    found: Counter[str] = Counter()
    highest: dict[str, int] = {}
    for name in model.table:
        match = _NUMBERED.match(name)
        if match:
            found[match[1]] += 1
            highest[match[1]] = max(highest.get(match[1], 0), int(match[2]))
    long = [prefix for prefix, _ in found.most_common() if highest[prefix] > 0 or len(found) == 1]
    if len(long) != 1:
        what = f"several lists of layers ({', '.join(long)})" if long else "no list of layers"
        raise MergeidError(f"{model.source} has {what}; slices need a model with one")
    return Layers(long[0], highest[long[0]] + 1)


def stacked(slices: Sequence[Slice], name: str = "") -> Derived:
    """One model of these slices; what lies outside of the layers is the first slice's model's up to them, and the last
    one's behind them.

    Args:
        slices: bottom first.
        name: what messages call it.

    Raises:
        MergeidError: layers that a model does not have, or models that do not go together.
    """
    bottom, top = slices[0].model, slices[-1].model
    where = {id(s.model): layers_of(s.model) for s in slices}
    layers = where[id(bottom)]
    for one in slices:
        has = where[id(one.model)]
        if not 0 <= one.first < one.end <= has.count:
            raise MergeidError(
                f"layer_range [{one.first}, {one.end}] of {one.model.source} is not a range of its {has.count} "
                f"layers; expected the first layer and the one after the last"
            )
    later = behind(bottom, layers) if top is not bottom else set()
    formed: dict[str, Formed] = {}
    for key in bottom.table:
        if layers.split(key) is None and key not in later:
            formed[key] = read_from(bottom, key)
    at = 0
    for one in slices:
        for key in one.model.table:
            place = where[id(one.model)].split(key)
            if place is not None and one.first <= place[0] < one.end:
                formed[f"{layers.prefix}.{at + place[0] - one.first}.{place[1]}"] = read_from(one.model, key)
        at += len(one)
    for key in top.table:
        if key in later or (top is not bottom and key not in bottom.table and where[id(top)].split(key) is None):
            formed[key] = read_from(top, key)
    config = _resized(slices, layers, at)
    source = name or " + ".join(f"{s.model.source}[{s.first}:{s.end}]" for s in slices)
    return derived(source, bottom, formed, parents=[s.model for s in slices], config=config)


def behind(model: Checkpoint, layers: Layers) -> set[str]:
    """Tensors that the network uses behind its layers: those that come after them where the network is built."""
    from mergeid.io.building import Room, build
    from mergeid.models.architecture import find_architecture
    from mergeid.nn.names import plain_table

    adapter, arch = find_architecture(model)
    network = build(adapter, arch, Room.of(model.table), device="meta")
    names = {key: name for name, key in adapter.tensor_names(arch, network, plain_table(model.table)).items()}
    found: set[str] = set()
    seen = False
    for key in network.state_dict():
        name = names.get(key)
        if name is None:
            continue
        inside = layers.split(name) is not None
        seen = seen or inside
        if seen and not inside:
            found.add(name)
    return found


def _resized(slices: Sequence[Slice], layers: Layers, count: int) -> dict[str, Any] | None:
    """The first model's config, with the new number of layers and lists that have an entry per layer."""
    config = slices[0].model.config
    if config is None:
        return None
    keys = [k for k, v in config.items() if _LAYER_COUNT.search(k) and v == layers.count]
    if not keys:
        raise MergeidError(
            f"the config of {slices[0].model.source} does not say that it has {layers.count} layers; expected "
            "num_hidden_layers, or a key like it"
        )
    changed = {**config, **dict.fromkeys(keys, count)}
    for key, value in config.items():
        if isinstance(value, list) and len(value) == layers.count:
            entries: list[Any] = []
            for one in slices:
                own = (one.model.config or {}).get(key)
                entries += (own if isinstance(own, list) else value)[one.first : one.end]
            changed[key] = entries
    return changed
