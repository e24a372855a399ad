"""Merges of adapters are what PEFT's `add_weighted_adapter` makes of them, where it works on the products."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft_parity import WAYS, apart, difference, prepared


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return prepared(tmp_path_factory.mktemp("peft"))


@pytest.mark.parametrize("way", WAYS)
def test_same_update_as_peft(paths: list[Path], tmp_path: Path, way: str) -> None:
    most, size = difference(paths, way, tmp_path)
    assert most < 2e-6 and size > 0.05


def test_factors_added_apart_are_another_thing(paths: list[Path]) -> None:
    """So that nobody expects PEFT's `linear` here."""
    most, size = apart(paths, "linear")
    assert most > 0.1 * size
