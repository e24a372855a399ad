"""What a solved merge imitates: all models by their shares, or each on its own examples; a merge that leans imitates
mostly one model in its hidden layers.

Where each model has data of its own, the hidden layers of one network would have to answer as one model does on some
inputs and as another does on others. Where the models' neurons hardly correspond (ViTs) that is asked too much: hidden
layers that mostly imitate one model on all inputs (`OWN_LEAN`), and a last layer that imitates each on its own, come
nearer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mergeid.repair.solve import Shares
    from mergeid.stages.members import Members

LEAN = 0.1
"""Share of all models but one in the hidden layers of a merge that leans."""
OWN_LEAN, OWN_SHARE = 0.25, 0.3
"""The same where each model has its own data, and what every example's own model counts there beside it."""


def leaning(members: Members, to: int, others: float = LEAN) -> Members:
    """The same models with weights that lean to one of them: it counts 1 − `others`, all the others that much."""
    shares = members.shares()
    rest = sum(shares) - shares[to]
    if not rest > 0:
        return members
    least = min(rest, others) / rest
    weights = tuple(max(w, 1 - others) if k == to else least * w for k, w in enumerate(shares))
    return replace(members, settings=replace(members.settings, weights=weights))


def own_shares(members: Members) -> Sequence[float] | Tensor:
    """Weights of the models in what is imitated: those of the merge, or [examples, models] where examples are a
    model's own."""
    owners = members.given.owners
    return members.shares() if owners is None else torch.eye(len(members.models), dtype=torch.float64)[list(owners)]


def leant_shares(members: Members, to: int) -> tuple[Members, Shares]:
    """The models with the weights of the average to start from, and what is imitated, where hidden layers lean to one
    model."""
    from mergeid.repair.solve import Shares

    last = own_shares(members)
    if not isinstance(last, Tensor):
        leant = leaning(members, to)
        return leant, Shares(last, leant.shares())
    leant = leaning(members, to, OWN_LEAN)
    mostly = torch.tensor(leant.shares(), dtype=torch.float64)
    return leant, Shares(last, OWN_SHARE * last + (1 - OWN_SHARE) * mostly)
