"""Convolutions of a GPU in all digits of float32. By itself cuDNN rounds their inputs to ten bits (TF32), which shows
in the figures of a merge, and fails the proof of a graph."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def precision_put_back() -> Iterator[None]:
    """What `full_precision` changes inside is as before afterwards."""
    before = _rounds()
    try:
        yield
    finally:
        if (after := _rounds()) is not None and after != before:
            _cudnn().allow_tf32 = before is not False  # torch begins with it


def full_precision() -> None:
    """From now on no convolution rounds its inputs, unless the caller has chosen so layer by layer."""
    import torch  # noqa: F401

    if _rounds():
        _cudnn().allow_tf32 = False


def _rounds() -> bool | None:
    """None where torch is not there yet, or says it of every kind of layer by itself."""
    if "torch" not in sys.modules:
        return None
    try:
        return bool(_cudnn().allow_tf32)
    except RuntimeError:
        return None


def _cudnn() -> Any:
    return sys.modules["torch"].backends.cudnn
