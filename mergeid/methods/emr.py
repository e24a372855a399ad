"""EMR: elect one task vector for all, and mask and rescale it for each (Huang et al. 2024, arXiv:2405.17485)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergeid.errors import MergeidError
from mergeid.methods.pieces import Pieces, added_up, in_pieces
from mergeid.methods.registry import Parameter, register_method
from mergeid.methods.task_arithmetic import LAMBDA, wide


@register_method(
    "emr",
    elementwise=False,
    weights="ignored",
    base=True,
    shows=True,
    parameters=[LAMBDA, Parameter("task", 0, 0, help="the model for this task, from 1; 0: the shared model")],
)
def emr(
    tensors: Sequence[Tensor], weights: Sequence[float], *, base: Tensor, scale: float = 1.0, task: int = 0
) -> Pieces:
    """``θ_0 + λ τ`` with the elected τ: per element the sign of ``Σ_i τ_i`` and the largest magnitude among those that
    bear it. For a task i it is masked and rescaled: ``λ_i M_i ⊙ τ``, ``M_i = [τ_i τ > 0]``,
    ``λ_i = Σ|τ_i| / Σ|M_i ⊙ τ|`` (here within each tensor, in the paper over the whole model).

    Args:
        tensors: θ_i, of equal shape.
        weights: not looked at.
        base: θ_0.
        scale: λ.
        task: i, from 1; 0: the elected task vector itself.

    Returns:
        Tensor of that shape, in the narrowest dtype that holds all θ_i exactly.

    Raises:
        MergeidError: there are fewer tasks.
    """
    if task > len(tensors):
        raise MergeidError(
            f"parameter 'task' is {task}; expected 1 to {len(tensors)} for one of the models, or 0 for none"
        )
    dtype, to = wide(tensors)

    def elected(pieces: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        origin = pieces[-1].to(to)
        deltas = [piece.to(to) - origin for piece in pieces[:-1]]
        sign = torch.stack(deltas).sum(0).sign()
        size = torch.stack([(d * sign).clamp_(min=0) for d in deltas]).amax(0)
        return size.mul_(sign), deltas

    factor = 1.0
    if task:

        def sizes(_: slice, pieces: list[Tensor]) -> list[Tensor]:
            chosen, deltas = elected(pieces)
            own = deltas[task - 1]
            return [own.abs().sum(), (chosen * (own * chosen > 0)).abs().sum()]

        before, after = [*added_up([*tensors, base], sizes).tolist(), 0.0, 0.0][:2]
        factor = before / after if after > 0 else 1.0

    def merge(_: slice, pieces: list[Tensor]) -> Tensor:
        chosen, deltas = elected(pieces)
        if task:
            chosen = chosen * (deltas[task - 1] * chosen > 0) * factor
        return chosen.mul_(scale).add_(pieces[-1].to(to))

    return in_pieces([*tensors, base], dtype, merge)
