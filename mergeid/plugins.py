"""What an architecture library must supply, and the registry that finds it.

An adapter is a class registered under the entry-point group ``mergeid.adapters``. It knows how to recognise,
build and feed the models of one library. The neuron graph does not come from the adapter: it is traced.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

from mergeid.basics.abilities import ComputesTables as ComputesTables
from mergeid.basics.abilities import Contents as Contents
from mergeid.basics.abilities import KnowsFolders as KnowsFolders
from mergeid.basics.abilities import KnowsHeads as KnowsHeads
from mergeid.basics.abilities import KnowsModules as KnowsModules
from mergeid.basics.abilities import KnowsNames as KnowsNames
from mergeid.basics.abilities import KnowsUnread as KnowsUnread
from mergeid.basics.abilities import NamesTasks as NamesTasks
from mergeid.basics.abilities import TiesWeights as TiesWeights
from mergeid.basics.mixtures import MakesMixtures as MakesMixtures
from mergeid.basics.mixtures import Mixture as Mixture
from mergeid.basics.mixtures import MixtureRequest as MixtureRequest
from mergeid.basics.mixtures import MixtureTensor as MixtureTensor
from mergeid.basics.reading import read_json as read_json
from mergeid.errors import MergeidError as MergeidError
from mergeid.errors import reason as reason
from mergeid.errors import shown as shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ENTRY_POINT_GROUP = "mergeid.adapters"
Made = TypeVar("Made", bound="nn.Module")


class TensorInfo(NamedTuple):
    """What a checkpoint's header says of one tensor: safetensors dtype name (``"F32"``) and shape."""

    dtype: str
    shape: tuple[int, ...]


TensorTable = Mapping[str, TensorInfo]
Batch = dict[str, Any]
"""Keyword inputs of one forward pass, as the model takes them; ``"labels"`` holds the targets, if any."""


@dataclass(frozen=True)
class Architecture:
    """One model structure that an adapter can build.

    Attributes:
        adapter: name of the adapter (``"timm"``).
        name: the library's own name (``"resnet18"``, ``"bert"``).
        options: everything else that `Adapter.build` needs (number of classes, image size, config dict).
        candidates: all names that fit equally well, `name` included, when inferred from a tensor table.
    """

    adapter: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    candidates: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """``adapter/name``, as ``--arch`` takes it."""
        return f"{self.adapter}/{self.name}"


class LossParts(NamedTuple):
    """Sums over the examples (or tokens) of a batch, one entry per example, so that sums stay exact.

    Attributes:
        loss: float tensor [examples], summed over the tokens of an example where there are several.
        correct: int tensor [examples], number of correct predictions (all zero where accuracy has no meaning).
        count: int tensor [examples], number of scored predictions.
    """

    loss: Tensor
    correct: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody calls here


@runtime_checkable
class Adapter(Protocol):
    """The protocol. All methods may raise `MergeidError` for input they can name as wrong."""

    name: str

    def architectures(self) -> Iterable[str]:
        """All names that ``--arch <adapter>/<name>`` accepts (may be long)."""
        ...

    def recognise(
        self, table: TensorTable, config: Mapping[str, Any] | None, metadata: Mapping[str, str]
    ) -> Architecture | None:
        """The architecture of a checkpoint from its tensor names and shapes, the ``config.json`` beside it and
        the file's metadata, without building a model (≤ 2 s). None: not one of this library's."""
        ...

    def resolve(self, name: str, table: TensorTable | None, config: Mapping[str, Any] | None) -> Architecture:
        """The architecture that the user named. Options (classes, image size) are read off `table` if given.
        Raises `MergeidError` for an unknown name."""
        ...

    def build(self, arch: Architecture, *, device: str | torch.device = "cpu") -> nn.Module:
        """A fresh model in eval mode with random weights; ``device="meta"`` builds without memory."""
        ...

    def tensor_names(self, arch: Architecture, model: nn.Module, table: TensorTable) -> dict[str, str]:
        """Checkpoint tensor name -> key of ``model.state_dict()``, for every tensor of `table` that the model
        has. Identity for most libraries."""
        ...

    def example_inputs(
        self, arch: Architecture, model: nn.Module, generator: torch.Generator, batch_size: int = 2
    ) -> Batch:
        """A small random batch (with labels where there is a task head) that drives every branch."""
        ...

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """The task output of one forward pass (logits where there is a head), ``batch["labels"]`` unused."""
        ...

    def loss(self, arch: Architecture, output: Tensor, batch: Batch) -> LossParts | None:
        """Loss of a task output against ``batch["labels"]``; None where the model has no task loss."""
        ...

    def preprocessing(self, arch: Architecture) -> Mapping[str, Any]:
        """How raw data becomes a batch: ``{"kind": "image", "size": (C, H, W), "mean": …, "std": …, …}`` or
        ``{"kind": "text", "max_length": …}``."""
        ...

    def space_label(self, arch: Architecture, axes: Iterable[tuple[str, int]]) -> str | None:
        """A human label for the space that lives on these (tensor, axis) pairs ("layers.3 MLP hidden"), or None
        to keep the default."""
        ...

    def companion_files(self, folder: Path) -> list[Path]:
        """Config, tokenizer and preprocessor files that belong beside the weights of a checkpoint folder."""
        ...


@runtime_checkable
class ReturnsSeveral(Protocol):
    """An adapter whose models return more than their task output."""

    def outputs(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Every floating-point (or complex) tensor of one forward pass that a caller reads, by name, the task output
        first (see `task_first`). All of them are frozen and compared. By-products are left out: caches, attentions,
        hidden states beside a task's own outputs, outputs of sub-models."""
        ...


class ConfigDifference(NamedTuple):
    """A field in which two configs describe networks that compute different things.

    Attributes:
        field: its name, dotted where it is nested (``"text_config.hidden_act"``).
        a, b: both values; None where a config does not have the field.
        effect: "function": what the network computes; "head": only what it does with its last features; "width": the
            widths of its layers; "inputs": how raw data should be prepared for it, or how long it may be.
    """

    field: str
    a: Any
    b: Any
    effect: Literal["function", "head", "width", "inputs"] = "function"


@runtime_checkable
class ComparesConfigs(Protocol):
    """Optional ability of an adapter: tells which fields of its library's configs change what a network computes."""

    def described(self, config: Mapping[str, Any] | None, metadata: Mapping[str, str]) -> Mapping[str, Any] | None:
        """What a ``config.json`` and a file's metadata say of the network; None: nothing, or not this library's."""
        ...

    def config_differences(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[ConfigDifference]:
        """Every field in which two descriptions differ, other than those known to be harmless. Formats of other
        versions and defaults that are written out or left out are no differences."""
        ...

    def adopted(self, config: Mapping[str, Any], other: Mapping[str, Any], *, head: bool) -> dict[str, Any]:
        """A config.json that computes what `other` computes, with `config`'s own labels, sizes and storage; with
        `head` its class is `other`'s too."""
        ...


Size = tuple[int, int]
"""Height and width of images in pixels."""


class Resized(NamedTuple):
    """The tables of a model that was made for images of one size, as they are for another.

    Attributes:
        size, to: both sizes.
        tensors: name in the file -> how its values are resampled; None: the library computes them.
        fixed: names of tensors that depend on the size, and that the library does not resample.
    """

    size: Size
    to: Size
    tensors: Mapping[str, Callable[[Tensor], Tensor] | None]
    fixed: tuple[str, ...] = ()


@runtime_checkable
class ResizesTables(Protocol):
    """Optional ability of an adapter: knows tables that follow the size of the images, such as learned positions, and
    resamples them as its library does."""

    name: str

    def input_size(self, arch: Architecture) -> Size:
        """Of the images that it is built for."""
        ...

    def resized(
        self, arch: Architecture, table: TensorTable, to: Architecture, to_table: TensorTable
    ) -> Resized | None:
        """The tables of one model at the image size of another, whose tensors have the same names; None: they are not
        one architecture at two sizes."""
        ...

    def config_at(
        self, config: Mapping[str, Any], to: Architecture, size: Size, like: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """A config.json that describes the network of `to`, with `config`'s own classes.

        Args:
            like: the other model's config.json; None: it has none.
        """
        ...


@runtime_checkable
class SetsClasses(Protocol):
    """Optional ability of an adapter: knows where a classifier's number of classes and their names are written."""

    def with_classes(self, arch: Architecture, classes: int) -> Architecture:
        """The architecture with a head for so many classes."""
        ...

    def config_with_classes(
        self, config: Mapping[str, Any], classes: int, labels: Sequence[str] | None
    ) -> dict[str, Any]:
        """A config.json that says so; labels: their names, None where nobody has named them."""
        ...


def returned_tensors(output: Any) -> dict[str, Tensor]:
    """Every floating-point (or complex) tensor in what a model returned, by where it stands there: ``"logits"``,
    ``"heads.0"``, ``""`` for a bare tensor."""
    from mergeid.basics.nested import returned_tensors

    return returned_tensors(output)


def task_first(task: Tensor, returned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All outputs by name, the task output first: one of them, or what was made of several (then called ``"task"``)."""
    own = {k: t for k, t in returned.items() if t is task} or {"task": task}
    return {**own, **returned}


@runtime_checkable
class HasModules(Protocol):
    """Optional ability of an adapter: knows the parts of its models that are merged by recipes of their own."""

    def modules(self, config: Mapping[str, Any], names: Iterable[str]) -> Mapping[str, str] | None:
        """Tensor -> the part that it belongs to (``"encoder"``); None: the model has one part alone."""
        ...


@runtime_checkable
class StacksExperts(Protocol):
    """Optional ability of an adapter: knows tensors that its library puts together of the experts' own on loading."""

    def stacked(self, model: nn.Module, names: Iterable[str]) -> Mapping[str, Sequence[Sequence[str]]]:
        """Key of the model's state dict -> the tensors of a file that it is made of: one list for each kind of weight,
        with one name per expert. The experts of a kind are stacked along axis 0, then the kinds are joined along
        axis 1."""
        ...


@dataclass(frozen=True)
class Conversion:
    """Tensors of a file that a library turns into others on loading: experts stacked, a projection split in three.

    Attributes:
        names: in the file.
        keys: of the network's state dict.
        load: the file's tensors by name -> the network's by key.
        save: the network's by key -> the file's by name.
    """

    names: tuple[str, ...]
    keys: tuple[str, ...]
    load: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    save: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@runtime_checkable
class ConvertsWeights(Protocol):
    """Optional ability of an adapter: knows what its library converts on loading."""

    def conversions(self, model: nn.Module, table: TensorTable) -> Sequence[Conversion]:
        """Those of the tensors of a file; what is only renamed is not among them (`Adapter.tensor_names`)."""
        ...


_registered: dict[str, Adapter] = {}


def register(adapter: Adapter) -> None:
    """Add an adapter by hand (notebooks, tests). Raises ValueError on a duplicate name."""
    if adapter.name in _registered:
        raise ValueError(f"adapter {adapter.name!r} is registered already")
    _registered[adapter.name] = adapter


@cache
def _entry_points() -> dict[str, Any]:
    return {e.name: e for e in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name)}


def adapter_names() -> list[str]:
    """Names of all installed adapters, without importing them."""
    return sorted({*_entry_points(), *_registered})


def get_adapter(name: str) -> Adapter:
    """The adapter of that name, imported on first use. Raises `MergeidError` for an unknown one."""
    if name not in _registered:
        found = _entry_points().get(name)
        if found is None:
            raise MergeidError(f"no adapter named {name!r} is installed; expected one of {', '.join(adapter_names())}")
        _registered[name] = found.load()()
    return _registered[name]


def config_owner(config: Mapping[str, Any]) -> ComparesConfigs | None:
    """The adapter that understands a config; None: none does."""
    adapters = (get_adapter(name) for name in adapter_names())
    return next((a for a in adapters if isinstance(a, ComparesConfigs) and a.described(config, {}) is not None), None)


def part_differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[ConfigDifference]:
    """Every field in which the configs of several networks differ (`Contents.config`'s ``"parts"``), each compared by
    the adapter that understands it."""
    found: list[ConfigDifference] = []
    for name in sorted({*a, *b}):
        one, two, where = a.get(name) or {}, b.get(name) or {}, f"{prefix}{name}." if name else prefix
        owner = config_owner(one)
        if owner is not None and owner is config_owner(two):
            found += [d._replace(field=where + d.field) for d in owner.config_differences(one, two)]
        else:
            keys = sorted(k for k in {*one, *two} if not k.startswith("_") and one.get(k) != two.get(k))
            found += [ConfigDifference(where + k, one.get(k), two.get(k)) for k in keys]
    return found


def part_adopted(config: Mapping[str, Any], other: Mapping[str, Any], *, head: bool) -> dict[str, Any]:
    """`ComparesConfigs.adopted` for the configs of several networks."""
    found: dict[str, Any] = {}
    for name, theirs in other.items():
        owner, mine = config_owner(theirs), config.get(name)
        found[name] = dict(theirs) if owner is None or not mine else owner.adopted(mine, theirs, head=head)
    return found


def made_on(device: str | torch.device, make: Callable[[], Made]) -> Made:
    """A model made on a device, for `Adapter.build`. Some classes read numbers off tensors while they are made, which
    the meta device refuses; then only their parameters are there while they are made, and the rest follows."""
    import torch

    place = torch.device(device)
    try:
        with place:
            return make()
    except (RuntimeError, NotImplementedError):
        if place.type != "meta":
            raise
    from accelerate import init_empty_weights

    with init_empty_weights():
        return make().to(place)


def near_names(name: str, names: Iterable[str], n: int = 5) -> list[str]:
    """Known names that look like a mistyped one, best first."""
    return difflib.get_close_matches(name, list(names), n=n, cutoff=0.5)
