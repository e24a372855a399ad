"""Examples that models are run on, with how they become batches: one value that travels whole."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Subset

from mergeid.basics.nested import named_tensors
from mergeid.data.batches import (
    Collate,
    FixedBatches,
    NamedInputs,
    WholeInputs,
    dataset_length,
    input_dtype,
    is_whole,
    to_model,
)
from mergeid.data.batching import drawn, unloaded
from mergeid.errors import MergeidError
from mergeid.plugins import Batch
from mergeid.request.request import OwnData

if TYPE_CHECKING:
    from mergeid.models.loaded import Loaded


@dataclass(frozen=True)
class Examples:
    """Attributes:
    items: map-style data.
    collate: list of items -> batch; torch's default for None.
    owners: number of the model that every item belongs to; None: they belong to no one.
    """

    items: Any
    collate: Collate | None = None
    owners: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return dataset_length(self.items)

    @property
    def whole(self) -> bool:
        """Whether every item is all that one forward pass takes."""
        return is_whole(self.items)

    def taken(self, indices: Sequence[int]) -> Examples:
        """Some of them, in that order."""
        owners = None if self.owners is None else tuple(self.owners[i] for i in indices)
        return Examples(Subset(self.items, list(indices)), self.collate, owners)

    def by_owner(self) -> list[Examples]:
        """Those of every model, in the models' order; one, themselves, where they belong to no one."""
        if self.owners is None:
            return [self]
        owners = self.owners
        return [self.taken([i for i, o in enumerate(owners) if o == k]) for k in range(max(owners) + 1)]

    def batched(self, what: str) -> Examples:
        """Themselves, where they can be put into batches; raises `MergeidError`, which says what needs that."""
        if self.whole:
            raise MergeidError(
                f"{what} puts examples into batches, and each item of the data is a whole input; expected items with "
                "one dimension fewer than the example inputs"
            )
        return self

    def batches(self, size: int) -> FixedBatches:
        """About `size` examples each, the same whatever process asks."""
        return FixedBatches(self.items, size, self.collate)

    def unlabelled(self, size: int, loaded: Loaded, device: torch.device) -> Iterator[Batch]:
        """One pass over them without targets, on a device, in the model's number format."""
        for batch in self.batches(size):
            yield loaded.inputs_of(to_model(batch, device, input_dtype(loaded.model)))


def examples_of(data: Any, loaded: Loaded, limit: int | None, seed: int, image_size: int | None = None) -> Examples:
    """What a user gives as data, as a model takes it; every model's own data in one random order.

    Args:
        image_size: height and width of images; None: the model's own.

    Raises `MergeidError` for what does not fit it."""
    if isinstance(data, OwnData):
        return _together([examples_of(own, loaded, limit, seed, image_size) for own in data.data], limit, seed)
    if loaded.adapter.name == "torch":
        if image_size is not None:
            raise MergeidError("the data of a live module is taken as is; leave out image_size")
        given = Examples(_as_given(data, loaded))
        return given if limit is None or limit >= len(given) else given.taken(drawn(len(given), limit, seed))
    from mergeid.data import collate, load_data

    adapter, arch, folder = loaded.adapter, loaded.arch, loaded.folder
    found = load_data(data, adapter=adapter, arch=arch, folder=folder, limit=limit, seed=seed, image_size=image_size)
    return Examples(found, collate)


def _together(parts: Sequence[Examples], limit: int | None, seed: int) -> Examples:
    """The examples of several models, equally many of each as far as the limit goes."""
    if any(part.whole for part in parts):
        raise MergeidError(
            "separate data for each model (a=…,b=…) must be examples that can be batched, not whole inputs"
        )
    most = max(limit // len(parts), 1) if limit is not None else max(map(len, parts))
    taken = [part.taken(range(min(len(part), most))) for part in parts]
    owners = [k for k, part in enumerate(taken) for _ in range(len(part))]
    order = np.random.default_rng(seed).permutation(len(owners)).tolist()
    return Examples(ConcatDataset([p.items for p in taken]), parts[0].collate, tuple(owners)).taken(order)


def _as_given(data: Any, loaded: Loaded) -> Any:
    """A live module's data: examples that are stacked into batches where its items have one dimension less than the
    example inputs, else whole inputs."""
    if isinstance(data, (str, os.PathLike, Mapping)):
        kind = "a table of columns" if isinstance(data, Mapping) else "a path"
        raise MergeidError(
            f"the data of the live module {loaded.source} is {kind}; expected a sequence of examples: tensors, tuples "
            "or dicts of its inputs"
        )
    data = unloaded(data)
    if not hasattr(data, "__getitem__") or isinstance(data, (nn.Module, bytes)):
        raise MergeidError(
            f"the data of the live module {loaded.source} is of type {type(data).__name__}; expected a list of "
            "examples, or a dataset with __len__ and __getitem__"
        )
    dataset_length(data)
    count = len(loaded.inputs)
    label = f"arg{count}" if _ends_with_label(NamedInputs(data).given(0), loaded.inputs, loaded.model) else None
    named = NamedInputs(data, label)
    first, example = named_tensors(loaded.inputs_of(named[0])), named_tensors(loaded.inputs)
    alike = set(first) == set(example) and all(t.dim() == example[k].dim() for k, t in first.items())
    return WholeInputs(data, label) if alike else named


def _ends_with_label(item: Any, inputs: Mapping[str, Any], model: nn.Module) -> bool:
    """Whether items are tuples of the positional inputs that the model is run with and, last, a label, as torch's own
    datasets give them: a class, or what the forward has no place for."""
    count = len(inputs)
    paired = isinstance(item, (tuple, list)) and not hasattr(item, "_fields") and len(item) == count + 1
    if not paired or set(inputs) != {f"arg{i}" for i in range(count)}:
        return False
    if _is_class(item[-1]):
        return True
    try:
        inspect.signature(model.forward).bind(*range(count + 1))
    except TypeError:
        return True
    except ValueError:  # compiled code has no signature
        pass
    return False


def _is_class(last: Any) -> bool:
    """One whole number; several may be a mask, for which the forward may have a place."""
    if isinstance(last, torch.Tensor):
        return last.numel() == 1 and not last.is_floating_point() and not last.is_complex()
    array = isinstance(last, np.ndarray) and last.size == 1 and last.dtype.kind in "iub"
    return array or isinstance(last, (int, np.integer))


def enough(examples: Examples | None, least: int, what: str) -> Examples:
    """The examples. Raises `MergeidError` where there are fewer than `least`; `what`: they are needed for."""
    count = 0 if examples is None else len(examples)
    if examples is None or count < least:
        raise MergeidError(
            f"at least {least} examples are needed {what}, and there are {count}; give more in --data, or a larger "
            f"--limit"
        )
    return examples
