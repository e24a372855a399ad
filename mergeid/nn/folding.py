"""From asymmetric layers back to the ordinary architecture of the same function."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mergeid.errors import MergeidError
from mergeid.nn.effective import Asymmetric, effective_weight, strip
from mergeid.nn.names import FIXED, MASK, asymmetric_parameters, gates, plain_table


def effective_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the ordinary names, with the values that the network computes with; tied weights stay tied."""
    out = dict(plain_table(state))
    done: dict[tuple[int, ...], Tensor] = {}
    with torch.no_grad():
        for name in asymmetric_parameters(state):
            weight, fixed, mask = (state.get(n) for n in (name, name + FIXED, name + MASK))
            assert weight is not None and fixed is not None
            key = tuple(0 if t is None else t.data_ptr() for t in (weight, fixed, mask))
            if key not in done:
                done[key] = effective_weight(weight.detach(), fixed, mask)
            out[name] = done[key]
    return out


def fold_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The plain state dict of the same function: effective weights under the ordinary names, nothing else; idempotent.

    Raises `MergeidError` for σ-asymmetric activations, which have no ordinary form."""
    _refuse_gates(state)
    return effective_state(state)


def fold_line(
    a: dict[str, Tensor], b: dict[str, Tensor], model: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Tensor], nn.Module]:
    """Two states and their network, plain where they are asymmetric: the line between two networks is that of the
    weights that they compute with, also where masks were permuted."""
    if asymmetric_parameters(a) and not gates(a):
        return fold_state(a), fold_state(b), fold_module(copy.deepcopy(model))
    return a, b, model


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
