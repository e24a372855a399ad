"""Which examples go into which batch, and which process works on which batch.

Batches are fixed by the data set and the batch size alone; process r of w takes the batches r, r + w, r + 2w, ….
Nothing is padded and nothing is dropped, so that sums over all processes are sums over the data set, and every
batch is computed exactly as it would be by one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset, default_collate

from mergeid.basics.casting import kept_kind
from mergeid.basics.nested import as_batch, mapped
from mergeid.data.batching import told
from mergeid.errors import MergeidError
from mergeid.plugins import Batch

Collate = Callable[[list[Any]], Batch]


def dataset_length(dataset: Any) -> int:
    """Number of examples. Raises `MergeidError` for a data set without a length or without examples."""
    try:
        count = len(dataset)
    except (TypeError, ValueError, OverflowError) as error:  # no length, or one below 0 or beyond 2^63
        raise MergeidError(
            f"the dataset {type(dataset).__name__} has no length; expected a map-style dataset "
            "(with __len__ and __getitem__), so turn a stream into a list first"
        ) from error
    if count == 0:
        raise MergeidError("the dataset has no examples; expected at least one")
    return count


def consecutive(count: int, size: int) -> list[range]:
    """0 … count−1 in runs of `size`, the last one shorter where it must be."""
    if size < 1:
        raise MergeidError(f"the batch size is {size}; expected at least 1")
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def balanced(count: int, size: int) -> list[range]:
    """0 … count−1 in ⌈count / size⌉ runs whose lengths differ by one at most, so that no run is a small rest."""
    pieces = -(-count // max(size, 1))
    bounds = [round(count * k / max(pieces, 1)) for k in range(pieces + 1)]
    return [range(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]


class NamedInputs(Sequence[Any]):
    """Data whose items are batches by name (`mergeid.basics.nested.as_batch`), however they were given.

    Args:
        label: name of the entry that is no input but the label; None: items are inputs only.

    An item that cannot be read raises `MergeidError`, as does one that lacks its label."""

    def __init__(self, items: Any, label: str | None = None) -> None:
        self.items, self.label = items, label

    def __len__(self) -> int:
        return dataset_length(self.items)

    def given(self, index: int) -> Any:
        """An item as it is. Raises `MergeidError` where it cannot be read."""
        try:
            return self.items[index]
        except MergeidError:
            raise
        except Exception as error:  # the user's own code
            if isinstance(error, IndexError) and not 0 <= index < len(self):
                raise  # which ends a loop over them
            raise MergeidError(f"example {index} of the data cannot be read ({told(error)}); repair it") from error

    def __getitem__(self, index: Any) -> Any:
        found = as_batch(self.given(index))
        if self.label is None:
            return found
        if self.label not in found:
            raise MergeidError(f"example {index} of the data has no label, which others have; give it to all of them")
        return {**{k: v for k, v in found.items() if k != self.label}, "labels": found[self.label]}


class WholeInputs(NamedInputs):
    """Data of which every item is all that one forward pass takes (a graph's nodes and edges, a packed sequence): items
    are never stacked."""


def is_whole(dataset: Any) -> bool:
    """Whether items are whole inputs, also in a part of a data set."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return isinstance(dataset, WholeInputs)


def the_only(items: Sequence[Any]) -> Batch:
    """A batch of one whole input."""
    (item,) = items
    return dict(item)


class FixedBatches(Sequence[Batch]):
    """A data set as a sequence of batches of about `size` examples that depend on nothing else.

    Loads a batch when it is asked for, so that each process reads only its own.
    """

    def __init__(self, dataset: Any, size: int = 128, collate: Collate | None = None) -> None:
        if size < 1:
            raise MergeidError(f"the calibration batch is {size}; expected at least 1")
        whole = is_whole(dataset)
        self.dataset = dataset
        self.slices = balanced(dataset_length(dataset), 1 if whole else size)
        self.collate = the_only if whole else collate or default_collate

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        with _can_be_batched(self.slices[index]):
            return self.collate([self.dataset[i] for i in self.slices[index]])


class MadeBatches(Sequence[Batch]):
    """A data set's batches, each changed when it is asked for.

    Args:
        batches: as they are loaded.
        make: number of a batch, batch -> what is given away.
    """

    def __init__(self, batches: FixedBatches, make: Callable[[int, Batch], Batch]) -> None:
        self._batches, self._make = batches, make
        self.slices = batches.slices

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, index: Any) -> Any:
        return self._make(index, self._batches[index])


def loaded(
    dataset: Any, slices: Sequence[range], *, rank: int, world: int, collate: Collate | None, workers: int = 0
) -> Iterator[tuple[int, Batch]]:
    """(index of the batch, batch) for the batches of process `rank` out of `world`."""
    mine = range(rank, len(slices), world)
    loader = iter(
        DataLoader(
            dataset,
            batch_sampler=[list(slices[index]) for index in mine],
            collate_fn=collate,
            num_workers=min(workers, len(mine)),
        )
    )
    for index in mine:
        with _can_be_batched(slices[index]):
            batch = next(loader)
        yield index, batch


@contextmanager
def _can_be_batched(examples: range) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, TypeError, ValueError, LookupError) as error:
        raise MergeidError(
            f"examples {examples[0]} to {examples[-1]} of the data cannot be read as one batch: "
            f"{type(error).__name__}: {first_line(error)}; "
            "expected items of equal keys and shapes"
        ) from error


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or "no message").splitlines()[0]


def shared_out(batches: Iterable[Batch], *, rank: int, world: int) -> Iterator[tuple[int, Batch]]:
    """(index, batch) of the batches of one process. A sequence is asked only for those; any other iterable, which
    must be the same on all processes, is read through."""
    if isinstance(batches, Sequence):
        return ((index, batches[index]) for index in range(rank, len(batches), world))
    return islice(enumerate(batches), rank, None, world)


def to_model(batch: Batch, device: torch.device, dtype: torch.dtype | None) -> Batch:
    """The batch on `device`; floating inputs (never the labels) in the model's `dtype`, complex ones
    in its precision."""

    def place(key: str, value: Any) -> Any:
        def moved(x: torch.Tensor) -> torch.Tensor:
            if x.is_meta and device.type != "meta":
                raise MergeidError(f"the input {key!r} is on the meta device and holds no values; expected real inputs")
            wanted = x.dtype if dtype is None or key == "labels" else kept_kind(x, dtype)
            return x.to(device=device, dtype=wanted, non_blocking=True)

        return moved(value) if isinstance(value, torch.Tensor) else mapped(value, moved)

    if not isinstance(batch, Mapping):
        raise MergeidError(
            f"a batch is a {type(batch).__name__}; expected a mapping from the model's keywords (and 'labels') "
            "to tensors, so give items of that form or a collate function that makes them"
        )
    return {key: place(key, value) for key, value in batch.items()}


def input_dtype(model: torch.nn.Module) -> torch.dtype | None:
    """The floating dtype that holds most of the model's parameters; None for a model without any."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None


def describe(batch: Batch) -> str:
    """Names, shapes and dtypes of a batch, for error messages."""
    parts = [
        f"{key} {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        if isinstance(value, torch.Tensor)
        else f"{key} {type(value).__name__}"
        for key, value in batch.items()
    ]
    return ", ".join(parts)
