"""Large models, whose weights stay where they lie: mapped files, or what is formed of several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeid.errors import MergeidError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mergeid.basics.on_demand import Form, Rows
    from mergeid.io.tensors import TensorSource

LARGEST_HELD = 150_000_000
"""Parameters up to which a model is held in memory. Of a larger one every weight is read when it is used, in the number
format of its file, and let go."""


def put_mapped(model: nn.Module, checkpoint: TensorSource, names: Mapping[str, str]) -> None:
    """Let a model without values read its matrices and kernels from a checkpoint as it runs; the rest is copied.

    Args:
        names: checkpoint tensor name -> key of the model's state dict.

    Raises `MergeidError` for a parameter without a tensor."""
    import torch

    from mergeid.basics.memory import give_back_at_once
    from mergeid.basics.on_demand import OnDemand, put_weights

    give_back_at_once()

    own = model.state_dict(keep_vars=True)
    values: dict[int, Tensor] = {}
    with torch.no_grad():
        for name, key in names.items():
            place = own.get(key)
            if place is None:
                continue
            if not isinstance(place, torch.nn.Parameter):
                place.copy_(checkpoint.tensor(name))
            elif place.dim() < 2:
                values[id(place)] = checkpoint.tensor(name).to(place.dtype, copy=True)
            else:
                values[id(place)] = OnDemand(_reader(checkpoint, name), place.shape, place.dtype)
    put_weights(model, values)
    absent = next((n for n, p in model.named_parameters() if p.is_meta), None)
    if absent is not None:
        raise MergeidError(
            f"{checkpoint.source} has no tensor for parameter {absent!r}; name its architecture (--arch)"
        )


def _reader(checkpoint: TensorSource, name: str) -> Form:
    def rows(which: Rows) -> Tensor:
        return checkpoint.tensor(name)[which]

    return rows
