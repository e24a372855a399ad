"""Sentences for numbers that cannot be merged, said alike by every way to merge them."""

from __future__ import annotations

from collections.abc import Sequence

from mergeid.io.tensors import TensorSource


def not_finite(name: str, checkpoint: TensorSource, *, nan: bool, skips: bool = True) -> str:
    """A tensor of an input holds NaN or an infinite number; `skips`: whether the verb knows ``--skip``."""
    what = "NaN" if nan else "an infinite number"
    other = f", or take this tensor from the first model as is with --skip {name!r}" if skips else ""
    return (
        f"tensor {name!r} of {checkpoint.file_of[name]} holds {what}; expected finite weights: use another checkpoint"
        f"{other}"
    )


def overflows(name: str, dtype: str, weights: Sequence[float]) -> str:
    """The inputs are finite and the result is not."""
    shown = ", ".join(f"{w:g}" for w in weights)
    return (
        f"tensor {name!r} overflows {dtype} when merged with weights {shown}; choose a wider format "
        "(--dtype float32) or other weights"
    )
