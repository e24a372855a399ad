"""Rows on disk are the rows that came."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergeid.evidence.activations import Rows
from mergeid.evidence.spool import MOST, Spool


def some(count: int, width: int, seed: int) -> tuple[Rows, Rows]:
    g = torch.Generator().manual_seed(seed)
    example = torch.randint(100, (count,), generator=g)
    return Rows(torch.randn(count, width, generator=g), example), Rows(torch.randn(count, width, generator=g), example)


def test_rows_come_back_tap_by_tap_in_their_order() -> None:
    spool = Spool(1000)
    put = {("a", 0): [some(5, 3, 0), some(2, 3, 1)], ("b", 1): [some(4, 7, 2)], ("a", 1): [some(0, 2, 3)]}
    for turn in range(2):  # interleaved, as batches are
        for key, pairs in put.items():
            if turn < len(pairs):
                spool.put(key, *pairs[turn])
    assert spool.places == [("a", 0), ("b", 1)]  # of padding there are no rows
    for key in spool.places:
        pairs = put[key]
        for _ in range(2):  # as often as wanted
            back = list(spool.rows(key))
            assert len(back) == len(pairs)
            for found, given in zip(back, pairs, strict=True):
                for x, y in zip(found, given, strict=True):
                    assert torch.equal(x.values, y.values) and torch.equal(x.example, y.example)
                    assert x.values.dtype == torch.float32


@pytest.mark.parametrize(("expected", "kept"), [(MOST // 4, torch.float32), (MOST // 4 + 1, torch.bfloat16)])
def test_what_would_be_large_is_kept_short(expected: int, kept: torch.dtype) -> None:
    spool, (a, b) = Spool(expected), some(50, 4, 4)
    spool.put(("a", 0), a, b)
    ((x, y),) = spool.rows(("a", 0))
    assert torch.equal(x.values, a.values.to(kept).float()) and torch.equal(y.values, b.values.to(kept).float())


def test_the_files_go_with_it() -> None:
    spool = Spool(10)
    spool.put(("a", 0), *some(3, 2, 5))
    folder = Path(spool._folder.name)
    assert len(list(folder.iterdir())) == 1
    del spool
    assert not folder.exists()
