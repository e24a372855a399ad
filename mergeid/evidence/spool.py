"""Sampled activations on disk: of large networks the sums over all pairs of neurons do not fit into memory at once.

Rows are written as they come, tap by tap, and read again for one tap at a time, in the same order. What is computed
from them is what would be computed from the rows as they come.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mergeid.basics.stopping import TemporaryFolder
from mergeid.evidence.activations import Rows

Key = tuple[str, int]
MOST = 4 << 30
"""Bytes of rows up to which these are kept in float32; of more, in bfloat16."""


class Spool:
    """Rows of two models at the taps of spaces.

    Args:
        expected: numbers that are about to come.
    """

    def __init__(self, expected: int) -> None:
        self._folder = TemporaryFolder()
        self._dtype = torch.float32 if 4 * expected <= MOST else torch.bfloat16
        self._rows: dict[Key, list[tuple[Tensor, int]]] = {}

    def put(self, key: Key, a: Rows, b: Rows) -> None:
        """Rows of both models, of the same examples; of a batch of padding there are none."""
        if not len(a.values):
            return
        known = self._rows.setdefault(key, [])
        with open(self._path(key), "ab") as file:
            for rows in (a, b):
                values = rows.values.to(self._dtype).contiguous()
                file.write(values.view(torch.uint8).numpy().data)
        known.append((a.example, a.values.shape[1]))

    @property
    def places(self) -> list[Key]:
        """Where there are rows."""
        return list(self._rows)

    def rows(self, key: Key) -> Iterator[tuple[Rows, Rows]]:
        """What was put under a key, as it was put."""
        with open(self._path(key), "rb") as file:
            for example, width in self._rows[key]:
                both = []
                for _ in range(2):
                    read = bytearray(file.read(len(example) * width * self._dtype.itemsize))
                    values = torch.frombuffer(read, dtype=self._dtype).reshape(len(example), width).float()
                    both.append(Rows(values, example))
                yield both[0], both[1]

    def _path(self, key: Key) -> Path:
        at = list(self._rows).index(key)
        return Path(self._folder.name) / f"{at}.rows"
