"""RegMean's weights in a merged network: its linear layers, each from the models' own inputs there.

A solved layer imitates the mean of what the models answer. RegMean (`mergeid.methods.regmean`) lets every model's
weights count where its own inputs vary, which can be nearer where the answers hardly correspond; so the last look
compares both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from mergeid.basics.on_demand import is_on_demand
from mergeid.basics.state import load_weights
from mergeid.methods.registry import get_method
from mergeid.request.request import Run
from mergeid.stages.members import Members

METHOD = "regmean"
MOST = 1 << 30
"""Bytes that the Gram matrices of all models and layers may take together."""


def can_be_regressed(members: Members) -> bool:
    """By itself, without being asked for: shares of models for one task, with Gram matrices that can be held."""
    model, settings = members.first.model, members.settings
    if is_on_demand(model) or settings.method.name == METHOD or settings.method.weights != "shares":
        return False
    if members.base is not None or members.first.joined is not None or members.given.owners is not None:
        return False
    widths = [m.weight.shape[-1] for m in model.modules() if isinstance(m, nn.Linear)]
    return 0 < len(members.models) * sum(8 * d * d for d in widths) <= MOST


def regress(members: Members, merged: nn.Module, skip: Sequence[str], run: Run) -> int:
    """Give a merged network of these models RegMean's weights, with the factor that it has by default; how many layers
    have some. `skip`: globs of tensor names that are not merged."""
    asked = replace(members.settings, method=get_method(METHOD), parameters={})
    measured = replace(members, settings=asked).measured(run)
    load_weights(merged, measured.merged_state(skip))
    return len(measured.statistics[0]) if measured.statistics else 0
