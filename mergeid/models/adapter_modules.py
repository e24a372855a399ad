"""Which modules of a network an adapter of PEFT factors, and which it holds whole, so that PEFT finds all of them.

PEFT puts a wrapper around each module that it is told to save, and around each that has factors. It takes the name of a
module for all whose names end so, and cannot put one wrapper into another.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import nn

from mergeid.basics.aliases import tied_groups
from mergeid.errors import MergeidError
from mergeid.io.building import Room, build
from mergeid.io.checkpoint import Checkpoint
from mergeid.models.architecture import find_architecture
from mergeid.nn.names import plain_table

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
"""Which PEFT does not save."""


@dataclass(frozen=True)
class Anatomy:
    """A network as PEFT sees it.

    Attributes:
        source: what messages call the model.
        keys: name in the files -> key of the network.
        entries: all keys, in order.
        tied: key -> the other keys of the same tensor.
        linear: keys of the weights that can be factored.
        transposed: whether those are stored [in, out].
        modules: name -> module.
    """

    source: str
    keys: dict[str, str]
    entries: tuple[str, ...]
    tied: dict[str, tuple[str, ...]]
    linear: frozenset[str]
    transposed: bool
    modules: dict[str, nn.Module]

    @classmethod
    def of(cls, model: Checkpoint, name: str | None = None) -> Anatomy:
        """Built without memory; `name`: of its architecture, where the files do not say."""
        adapter, arch = find_architecture(model, name)
        network = build(adapter, arch, Room.of(model.table), device="meta")
        tied = {key: tuple(k for k in group if k != key) for group in tied_groups(network) for key in group}
        modules = dict(network.named_modules(remove_duplicate=False))
        stored = {k: s for k in tied if not tied[k] and (s := _stored(modules, k)) is not None}
        kinds = set(stored.values())
        if len(kinds) > 1:  # a head among Conv1D layers: PEFT has one setting for all
            stored = {key: transposed for key, transposed in stored.items() if transposed}
        keys = adapter.tensor_names(arch, network, plain_table(model.table))
        return cls(model.source, keys, tuple(tied), tied, frozenset(stored), kinds >= {True}, modules)

    def key_of(self, name: str) -> str:
        """Raises `MergeidError` for a tensor that the network has not under a key of its own."""
        if name in self.keys:
            return self.keys[name]
        raise MergeidError(
            f"{name} changed, and no tensor of the network of {self.source} is this one alone (it is stacked with "
            "others, or not used), so no adapter can hold it; keep the fine-tune itself"
        )

    def name_of(self, key: str) -> str:
        """Raises `MergeidError` for an entry of a module that lies in no file."""
        same = {key, *self.tied[key]}
        found = next((name for name, own in self.keys.items() if own in same), None)
        if found is None:
            raise MergeidError(
                f"{self.source} lacks {key}, without which no adapter can hold its module whole; save the model again"
            )
        return found

    def saved(self, whole: Iterable[str], factored: Collection[str]) -> list[str]:
        """The modules to save so that the adapter holds these tensors.

        Args:
            whole: keys of what changed in modules without factors.
            factored: the modules with factors.

        Raises:
            MergeidError: PEFT cannot save the module of one of them.
        """
        of = {module_of(key): key for key in whole}
        outer = {m: k for m, k in of.items() if not any(m.startswith(f"{other}.") for other in of)}
        found = {k: outer[m] for m in outer for k in self.modules if m and k.endswith(m)} | outer
        for module, key in found.items():
            inside = [m for m in (*factored, *found) if not module or m.startswith(f"{module}.")]
            excluded = [m for m in factored if re.match(rf"(^|.*\.){module}($|\..*)", m)]
            if not module or inside or excluded or isinstance(self.modules[module], _CONTAINERS):
                place = f"the module {module}" if module else "the network itself"
                raise MergeidError(
                    f"{key} changed, and PEFT cannot save the module that holds it ({place}) beside factors of its "
                    "layers, so no adapter can hold it; keep the fine-tune itself"
                )
        return sorted(found)

    def targets(self, factored: Collection[str]) -> list[str] | str:
        """What PEFT takes for these modules alone."""
        alike = any(m.endswith(f".{f}") and m not in factored for m in self.modules for f in factored)
        return "|".join(map(re.escape, sorted(factored))) if alike else sorted(factored)


def module_of(key: str) -> str:
    """The module that holds a tensor."""
    return key.rpartition(".")[0]


def _stored(modules: dict[str, nn.Module], key: str) -> bool | None:
    """Whether the weight of a linear layer is stored [in, out]; None: it is none that PEFT factors."""
    name, _, last = key.rpartition(".")
    module, parent = modules.get(name), modules.get(module_of(name))
    if last != "weight" or isinstance(parent, nn.MultiheadAttention):  # which does not call its layer
        return None
    # transformers' Conv1D is a linear layer whose weight is [in, out]
    stored = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    return stored if stored or isinstance(module, nn.Linear) else None
