"""Items and batches: what a dataset gives, and how items become a batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, default_convert

from mergeid.errors import MergeidError
from mergeid.plugins import Batch

IGNORED = -100
"""Label of a position that is not scored: the ``ignore_index`` of PyTorch's cross-entropy."""

SHUFFLED = 1 << 20
"""Examples that a random order is made of; of more, some are drawn."""
MASKS = frozenset({"attention_mask", "decoder_attention_mask"})
IDS = frozenset({"input_ids", "decoder_input_ids"})


def told(error: BaseException) -> str:
    """What an error of another library, or of the user's own code, says: its kind and first line."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first[:160]}" if first else type(error).__name__


def unloaded(data: Any) -> Any:
    """The dataset of a `DataLoader`, whose batches are made anew here; anything else as it is.

    Raises `MergeidError` where the loader makes batches in a way of its own."""
    if not isinstance(data, DataLoader):
        return data
    if data.collate_fn not in (default_collate, default_convert):
        raise MergeidError(
            "the data is a DataLoader with a collate_fn of its own; expected its dataset, or list(loader), whose items "
            "are whole inputs"
        )
    return data.dataset


def drawn(count: int, limit: int, seed: int) -> list[int]:
    """`limit` of so many examples, in their order. Of data too long to be shuffled none but those are numbered."""
    if count <= SHUFFLED:
        return sorted(torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit].tolist())
    return sorted(random.Random(seed).sample(range(count), limit))


class Item(dict[str, Any]):
    """One example: forward keywords and perhaps ``"labels"``, without a batch dimension. `pad_id` fills up token ids
    where texts of different lengths meet in a batch."""

    pad_id: int = 0


class ItemDataset(Dataset[Item]):
    """Items made on demand.

    Args:
        size: number of examples.
        get: the example of an index in ``range(size)``.
        source: where the data comes from, for error messages.
        labels: all labels that are one class per example, where they are known without reading the inputs.
    """

    def __init__(self, size: int, get: Callable[[int], Item], *, source: str, labels: Tensor | None = None) -> None:
        self._size = size
        self._get = get
        self.source = source
        self.labels = labels

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < self._size:
            raise IndexError(index)
        try:
            return self._get(index)
        except MergeidError:
            raise
        except Exception as error:  # the user's own code and files, and whatever library reads them
            raise MergeidError(
                f"example {index} of the data {self.source} cannot be read ({told(error)}); repair or remove it"
            ) from error

    def subset(self, indices: Sequence[int]) -> ItemDataset:
        """The examples of these indices, in this order."""
        chosen = list(indices)
        labels = None if self.labels is None else self.labels[chosen]
        return ItemDataset(len(chosen), lambda i: self[chosen[i]], source=self.source, labels=labels)

    def watched(self, look: Callable[[Item], None]) -> ItemDataset:
        """The same examples, each looked at before it is given away; `look` raises where it does not fit."""

        def get(index: int) -> Item:
            item = self[index]
            try:
                look(item)
            except MergeidError as error:
                raise MergeidError(f"example {index} of the data {self.source} does not fit: {error}") from error
            return item

        return ItemDataset(self._size, get, source=self.source, labels=self.labels)


def collate(items: Sequence[Item]) -> Batch:
    """Stack items into a batch; sequences of different lengths are filled up at the end (token ids with the pad id,
    attention masks with 0, labels with `IGNORED`).

    Raises `MergeidError` where items have different keys or shapes that cannot be stacked.
    """
    if not items:
        raise MergeidError("an empty batch: the data has no examples")
    keys = list(items[0])
    for item in items:
        if list(item) != keys and set(item) != set(keys):
            one = sorted(set(keys) ^ set(item))[0]
            raise MergeidError(f"only some of the examples have {one!r}; give it to all of them or to none")
    pad_id = getattr(items[0], "pad_id", 0)
    return {key: _stack(key, [torch.as_tensor(i[key]) for i in items], pad_id) for key in keys}


def _stack(key: str, values: list[Tensor], pad_id: int) -> Tensor:
    shapes = {tuple(v.shape) for v in values}
    if len(shapes) == 1:
        return torch.stack(values)
    if all(v.dim() == 1 for v in values) and (key in MASKS or key in IDS or key in ("labels", "token_type_ids")):
        fill = pad_id if key in IDS else IGNORED if key == "labels" else 0
        longest = max(v.shape[0] for v in values)
        return torch.stack([torch.nn.functional.pad(v, (0, longest - v.shape[0]), value=fill) for v in values])
    seen = " and ".join(str(list(s)) for s in sorted(shapes)[:2])
    raise MergeidError(f"examples have {key!r} of different shapes ({seen}); give all of them one shape")
