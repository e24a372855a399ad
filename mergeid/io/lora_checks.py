"""Whether the tensors of an adapter are numbers, and fit the base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mergeid.errors import MergeidError
from mergeid.io.tensors import TensorSource

if TYPE_CHECKING:
    from torch import Tensor


def finite(adapter: TensorSource, name: str) -> Tensor:
    """A tensor of the adapter. Raises `MergeidError` where it holds NaN or infinite numbers."""
    found = adapter.tensor(name)
    seen = found.float() if found.dtype.itemsize == 1 else found  # torch does not ask that of float8
    if not bool(seen.isfinite().all()):
        what = "NaN" if bool(seen.isnan().any()) else "an infinite number"
        raise MergeidError(
            f"{adapter.file_of[name]}: {name} holds {what}; expected finite numbers: use another adapter"
        )
    return found


def misfit(folder: Path, name: str, shape: tuple[int, ...], base: TensorSource, target: str) -> MergeidError:
    return MergeidError(
        f"{folder}: {name} {list(shape)} does not fit {target} {list(base.table[target].shape)} of {base.source}; "
        "expected the base that the adapter was trained on"
    )
