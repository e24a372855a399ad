"""The examples' own modules, as their scripts import them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest


@contextmanager
def modules_of(folder: Path, names: Sequence[str]) -> Iterator[SimpleNamespace]:
    """The modules of an example's folder, and no trace of them afterwards."""
    sys.path.insert(0, str(folder))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)


def of_one_group(zoo: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A zoo of one group of tiny MLPs on scikit-learn's digits."""
    group = zoo.recipes.Group("mlp", "digits", 0, 12, 1, steps=12)
    monkeypatch.setattr(zoo.recipes, "GROUPS", (group,))
    return zoo
