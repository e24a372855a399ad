"""From asymmetric layers back to the ordinary architecture of the same function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mergeid.errors import MergeidError
from mergeid.nn.effective import Asymmetric, effective_weight, strip
from mergeid.nn.names import FIXED, MASK, asymmetric_parameters, gates, plain_table


def fold_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The plain state dict: effective weights under the ordinary names, nothing else; idempotent.

    Every weight has the dtype that the layer computes with, and tied weights stay one tensor.

    Raises `MergeidError` for σ-asymmetric activations, which have no ordinary form."""
    _refuse_gates(state)
    out = dict(plain_table(state))
    done: dict[tuple[int, ...], Tensor] = {}
    with torch.no_grad():
        for name in asymmetric_parameters(state):
            parts = [t.detach() for t in (state[name], state[name + FIXED])]
            mask = state.get(name + MASK)
            key = tuple(t.data_ptr() for t in (*parts, *([] if mask is None else [mask])))
            if key not in done:
                done[key] = effective_weight(*parts, mask)
            out[name] = done[key]
    return out


def fold(model: nn.Module) -> dict[str, Tensor]:
    """The plain state dict of a model with asymmetric layers (the model stays as it is), see `fold_state`."""
    return fold_state(model.state_dict())


def fold_module(model: nn.Module) -> nn.Module:
    """Turn all asymmetric layers into the ordinary layers of the same function, in place. Returns `model`.

    Raises `MergeidError` for σ-asymmetric activations."""
    _refuse_gates(model.state_dict())
    asymmetric = [m for m in model.modules() if isinstance(m, Asymmetric)]
    values: dict[nn.Parameter, Tensor] = {}
    with torch.no_grad():
        for module in asymmetric:
            for name in module.fixed_names:
                parameter = module._parameters[name]
                assert parameter is not None
                values[parameter] = getattr(module, name).clone()
    # only now: layers with tied weights share one parameter
    for module in asymmetric:
        strip(module)
    for parameter, value in values.items():
        parameter.data = value
    return model


def _refuse_gates(names: Iterable[str]) -> None:
    found = gates(names)
    if found:
        raise MergeidError(
            f"{found[0]!r}: a σ-asymmetric activation has no ordinary form, so that its network cannot be folded; use "
            'kind "w" or "syre" where a plain checkpoint is needed'
        )
