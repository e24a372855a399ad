"""Optional abilities of an adapter that need nothing of the protocol itself; reached from `mergeid.plugins`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import nn


@runtime_checkable
class KnowsModules(Protocol):
    """An adapter that knows live modules of its library, however they are called."""

    def owns(self, model: nn.Module) -> bool:
        """Whether the module is one of the library's models, without importing the library."""
        ...

    def interface(self, names: Sequence[str]) -> list[str]:
        """Of the names of all tensors that a model returned (``"logits"``, ``"past_key_values.layers.0.keys"``) those
        that are no by-products."""
        ...


@runtime_checkable
class KnowsNames(Protocol):
    """Optional ability of an adapter: knows names of architectures without importing its library."""

    def at_hand(self, name: str, config: Mapping[str, Any] | None) -> bool:
        """Whether `Adapter.resolve` takes the name beside this ``config.json``. False: that takes the library to say.
        Costs a look into a file at most."""
        ...


@runtime_checkable
class KnowsHeads(Protocol):
    """A `KnowsModules` that can tell which output of a live module holds class logits."""

    def logits(self, model: nn.Module) -> str | None:
        """Name of that output, as `returned_tensors` has it; None: the model has none."""
        ...


@runtime_checkable
class TiesWeights(Protocol):
    """Optional ability of an adapter: knows configs under which an output head is the embedding itself."""

    def ties(self, config: Mapping[str, Any]) -> bool | None:
        """Whether the config says so; None: not this library's, or its networks have no such head."""
        ...

    def with_ties(self, config: Mapping[str, Any], tied: bool) -> dict[str, Any] | None:
        """The config with that setting; None where it cannot be had without changing something else."""
        ...


@runtime_checkable
class NamesTasks(Protocol):
    """Optional ability of an adapter: knows the class that its library uses for a task, of each kind of model."""

    def config_for(self, config: Mapping[str, Any], task: str) -> dict[str, Any] | None:
        """The config of the same model with the class for a task, as PEFT calls it (``"SEQ_CLS"``), or of that name;
        None: the library has none for this kind of model."""
        ...


@runtime_checkable
class ComputesTables(Protocol):
    """Optional ability of an adapter: knows weights that its library computes and leaves out of files, such as
    sinusoidal positions."""

    def computed(self, model: nn.Module, missing: Sequence[str]) -> Sequence[str]:
        """Of the keys of the model's state dict that a file lacks those whose values a built model has already."""
        ...


class Contents(NamedTuple):
    """What a folder holds whose networks lie in several sub-folders.

    Attributes:
        folders: those with weights, in the order in which they are used; ``""`` is the folder itself. The tensors of
            ``2_Dense`` are called ``2_Dense.linear.weight``, those of ``""`` as they are.
        config: what `Adapter.recognise` gets as the config. ``"parts"`` maps every sub-folder to what its
            ``config.json`` says.
    """

    folders: tuple[str, ...]
    config: dict[str, Any]


@runtime_checkable
class KnowsFolders(Protocol):
    """Optional ability of an adapter: knows folders of several networks, or configs that are no ``config.json``."""

    def contents(self, names: Sequence[str], read: Callable[[str], Any]) -> Contents | None:
        """Which sub-folders hold the weights of a folder; None: not one of this library's, or nothing special.

        Args:
            names: its files, ``"modules.json"``, ``"2_Dense/model.safetensors"``, two levels deep.
            read: name of a JSON file there -> its content.
        """
        ...


@runtime_checkable
class KnowsUnread(Protocol):
    """Optional ability of an adapter: knows outputs of a folder's network that its library never reads."""

    def unread(self, names: Sequence[str], read: Callable[[str], Any]) -> Sequence[str]:
        """Their names (`ReturnsSeveral.outputs`). They are frozen as the others are, but merges are not judged by them.

        Args:
            names, read: as of `KnowsFolders.contents`.
        """
        ...
