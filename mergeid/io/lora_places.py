"""Where a base has what an adapter changes: under its name, at its place in the network, or in what it is tied to."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mergeid.errors import MergeidError
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.networks import Network, network_of
from mergeid.io.tensors import TensorSource
from mergeid.plugins import TiesWeights, adapter_names, get_adapter


def base_ties(base: TensorSource) -> bool:
    """Whether the base's config says that its head is its embedding."""
    adapters = (get_adapter(name) for name in adapter_names())
    return any(isinstance(a, TiesWeights) and bool(a.ties(base.config or {})) for a in adapters)


@dataclass(frozen=True)
class Places:
    """Of one adapter on its base.

    Attributes:
        base: what it lies on.
        folder: of the adapter, for messages.
    """

    base: Checkpoint
    folder: Path

    @cached_property
    def network(self) -> Network | None:
        """The base's; built only where names do not tell."""
        return network_of(self.base)

    def of(self, name: str) -> str:
        """The base's tensor of that name, whatever stands before it in either.

        Raises:
            MergeidError: it has none, or several.
        """
        table, network = self.base.table, self.network_where(name)
        if network is None:
            ends = self._ending(name)
            if len(ends) == 1:
                return ends[0]
            what = f"{len(ends)} tensors with that ending" if ends else "no such tensor"
        else:
            key = network.key_of(name)
            found = None if key is None else network.name_of(key)
            if found is not None and found in table:
                return found
            if key in network.stacked:
                raise MergeidError(
                    f"{self.folder} changes {name!r}, into which experts are stacked that {self.base.source} holds one "
                    "by one; merge the adapter with PEFT first"
                )
            what = "no such tensor"
        cure = "expected the base that the adapter was trained on"
        raise MergeidError(f"{self.folder} changes {name!r}, and {self.base.source} has {what}; {cure}")

    def network_where(self, name: str) -> Network | None:
        """The base's network where a name alone does not tell which tensor is meant."""
        return None if len(self._ending(name)) == 1 else self.network

    def _ending(self, name: str) -> list[str]:
        if name in self.base.table:
            return [name]
        return [n for n in self.base.table if n.endswith(f".{name}") or name.endswith(f".{n}")]

    def untied(self, changed: Collection[str], copies: Collection[str]) -> Checkpoint:
        """The base, each of two tied tensors in its own where the adapter changes one of them alone.

        Args:
            changed: names of what the adapter changes.
            copies: those of what it holds once more because it is tied.

        Raises:
            MergeidError: the base's config cannot say that they are two.
        """
        network = self.network
        if network is None:
            return self.base
        follow = {network.key_of(name) for name in copies}
        alone = {key: network.tied.get(key, frozenset()) - follow for key in map(network.key_of, changed) if key}
        apart = {key for key, others in alone.items() if others}
        if not apart:
            return self.base
        first = min(apart)
        refused = MergeidError(
            f"{self.folder} changes {first!r} and not {min(alone[first])!r}, which are one in {self.base.source}; "
            "expected an adapter of both, or a base whose config does not tie them"
        )
        adapter, config = network.adapter, self.base.config
        told = adapter.with_ties(config, False) if isinstance(adapter, TiesWeights) and config is not None else None
        if told is None:
            raise refused
        found: Checkpoint = replace(self.base, config=told, config_changed=True)
        for key in sorted({*apart, *(k for a in apart for k in alone[a])}):
            source = next((n for n in map(network.name_of, (key, *network.tied[key])) if n is not None), None)
            if source is not None and network.name_of(key) is None:
                found = found.with_alias(key, source)
        after = network_of(found)
        if after is not None:  # a head's bias may be tied by the same word
            loose = {k for k in network.tied if k not in after.tied and network.name_of(k) is None} - apart
            partners = {k: [n for n in map(after.name_of, network.tied[k]) if n is not None] for k in loose}
            for key in sorted(k for k in loose if partners[k] and after.name_of(k) is None):
                found = found.with_alias(key, partners[key][0])
            after = network_of(found)
        if after is None or any(after.name_of(key) is None or after.tied.get(key) for key in apart):
            raise refused
        return found
