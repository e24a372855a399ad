"""Large values that are made when they are asked for, and kept while there is room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from mergeid.basics.stopping import TemporaryFolder

Value = TypeVar("Value")

ROOM = 1 << 28
"""Bytes that are kept beside the value that was asked for last."""


class WhenAsked(Mapping[str, Value]):
    """A mapping whose values are made when they are asked for; those asked for last are kept up to `ROOM`.

    Args:
        names: its keys.
        make: key -> value, the same each time.
        size: bytes of a value.
    """

    def __init__(self, names: Sequence[str], make: Callable[[str], Value], size: Callable[[Value], int]) -> None:
        self._names, self._make, self._size = dict.fromkeys(names), make, size
        self._kept: OrderedDict[str, Value] = OrderedDict()

    def __getitem__(self, name: str) -> Value:
        if name not in self._names:
            raise KeyError(name)
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        while len(self._kept) and sum(map(self._size, self._kept.values())) > ROOM:
            self._kept.popitem(last=False)
        made = self._kept[name] = self._make(name)
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


SMALL = 1 << 21
"""Bytes of an array that is not worth a file."""


class Stored(Mapping[str, np.ndarray]):
    """Arrays that are made once, when they are first asked for; large ones are mapped from files from then on. Threads
    may ask at the same time.

    Args:
        names: its keys.
        make: key -> array.
    """

    def __init__(self, names: Sequence[str], make: Callable[[str], np.ndarray]) -> None:
        self._make = make
        self._places = {name: (i, threading.Lock()) for i, name in enumerate(names)}
        self._made: dict[str, np.ndarray] = {}
        self._folder: TemporaryFolder | None = None
        self._alone = threading.Lock()

    def __getitem__(self, name: str) -> np.ndarray:
        at, lock = self._places[name]
        with lock:
            if name not in self._made:
                made = self._make(name)
                self._made[name] = self._mapped(made, at) if made.nbytes > SMALL else made
        return self._made[name]

    def _mapped(self, made: np.ndarray, at: int) -> np.ndarray:
        with self._alone:
            self._folder = self._folder or TemporaryFolder()
        path = Path(self._folder.name) / f"{at}.npy"
        np.save(path, made)
        found: np.ndarray = np.load(path, mmap_mode="r")
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
