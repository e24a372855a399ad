"""Live modules whose weights are not in place: Accelerate's hooks bring them in as each layer runs."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from mergeid.errors import MergeidError
from mergeid.io.opening import has_hooks, refuse_lazy, state_of

if TYPE_CHECKING:
    from torch import nn


def in_memory(module: nn.Module) -> nn.Module:
    """The module itself where its weights are in place; else a plain copy of it with all weights in memory.

    Raises `MergeidError` for layers without a shape yet, and where weights are nowhere to be found."""
    refuse_lazy(module)
    if not has_hooks(module):
        return module
    from accelerate.hooks import remove_hook_from_module

    state = state_of(module)
    plain = remove_hook_from_module(copy.deepcopy(module), recurse=True)
    plain.load_state_dict(state, strict=False, assign=True)
    if hasattr(plain, "tie_weights"):
        plain.tie_weights()
    plain = plain.to("cpu")
    absent = next((n for n, p in plain.named_parameters() if p.is_meta), None)
    if absent is not None:
        raise MergeidError(
            f"parameter {absent!r} of {type(module).__name__} is offloaded, and its values cannot be found; load the "
            "model again without offloading"
        )
    answer: nn.Module = plain
    return answer
