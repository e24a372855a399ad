"""Put weights into a live model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def tensors_of(model: nn.Module, *, keep_vars: bool = False) -> dict[str, Tensor]:
    """The state dict, without what is no tensor in it (extra state, the number format of packed weights)."""
    return only_tensors(model.state_dict(keep_vars=keep_vars))


def others_of(model: nn.Module) -> dict[str, Any]:
    """What is no tensor in the state dict: extra state, the number format of packed weights."""
    return {k: v for k, v in model.state_dict().items() if not isinstance(v, Tensor)}


def only_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those of a state dict."""
    return {k: v for k, v in state.items() if isinstance(v, Tensor)}


def evaluating(model: M) -> M:
    """The model, in eval mode: some models' own `train` returns nothing."""
    model.eval()
    return model


def load_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what `state` has and leave the model in eval mode.

    Some models keep values derived from their weights (attention biases by position) until the mode changes, so the
    mode is changed."""
    model.load_state_dict(state, strict=False)
    forget_derived(model)


def uncompiled() -> AbstractContextManager[Any]:
    """While open, what was given to `torch.compile` (by the model, or by flex attention) runs as it is written, so that
    every call can be seen."""
    stance = getattr(torch.compiler, "set_stance", None)  # torch 2.6
    return stance("force_eager") if stance is not None else nullcontext()


def forget_derived(model: nn.Module) -> None:
    """Make an eval-mode model drop values that it derived from earlier weights."""
    model.train()
    model.eval()
