"""SCE: select what varies most, calculate a weight per tensor, erase minority signs (Wan et al. 2024,
arXiv:2408.07990)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mergeid.methods.pieces import Pieces, added_up, in_pieces
from mergeid.methods.quantiles import at_places
from mergeid.methods.registry import Parameter, register_method
from mergeid.methods.task_arithmetic import wide

SMALLEST = 1e-6
"""Of a sum of weights; the same bound, on the sum of mean squares, below which all weights are equal."""


@register_method(
    "sce",
    elementwise=False,
    weights="ignored",
    base=True,
    parameters=[Parameter("select_topk", 1.0, 0.0, 1.0, help="share of the elements that vary between the models")],
)
def sce(tensors: Sequence[Tensor], weights: Sequence[float], *, base: Tensor, select_topk: float = 1.0) -> Pieces:
    """``θ_0 + Σ_{i∈A} η_i τ̂_i / Σ_{i∈A} η_i``, element by element.

    Select: τ̂_i keeps the elements of τ_i = θ_i − θ_0 whose variance over the models is among the ``select_topk`` share
    of largest (of those that vary at all; what ties with the smallest is kept). Calculate: η_i is the mean of τ̂_i²
    over the tensor, divided by the sum of all (equal, where that is below 1e-6). Erase: A = {i: τ̂_i bears the sign of
    Σ_i τ̂_i}, zero counting as positive.

    Args:
        tensors: θ_i, of equal shape.
        weights: not looked at: the method finds its own.
        base: θ_0.
        select_topk: share to select.

    Returns:
        Tensor of that shape, in the narrowest dtype that holds all θ_i exactly.
    """
    dtype, to = wide(tensors)
    everything = [*tensors, base]

    def deltas_of(pieces: Sequence[Tensor]) -> Tensor:
        origin = pieces[-1].to(to)
        return torch.stack([piece.to(to) - origin for piece in pieces[:-1]])

    selected = _selection(everything, deltas_of, select_topk, to)
    squares = added_up(everything, lambda _, pieces: [*selected(deltas_of(pieces)).double().square().sum(1)])
    squares = squares / max(base.numel(), 1) if len(squares) else torch.zeros(len(tensors), dtype=torch.float64)
    total = squares.sum()
    shares = (squares / total if total >= SMALLEST else torch.full_like(squares, 1 / len(tensors))).to(to)[:, None]

    def merge(_: slice, pieces: list[Tensor]) -> Tensor:
        deltas = selected(deltas_of(pieces))
        sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
        weighted = (deltas.sign() == sign) * shares
        merged = (deltas * weighted).sum(0).div_(weighted.sum(0).clamp_(min=SMALLEST))
        return merged.add_(pieces[-1].to(to))

    return in_pieces(everything, dtype, merge)


def _selection(
    everything: Sequence[Tensor], deltas_of: Callable[[Sequence[Tensor]], Tensor], share: float, to: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """A function that sets to 0 what is not selected of the deltas [models, elements] of a piece."""
    if share >= 1:
        return lambda deltas: deltas
    variance = in_pieces(everything, to, lambda _, pieces: deltas_of(pieces).var(0, unbiased=False))
    count = int(sum(int(torch.count_nonzero(part)) for part in variance) * share)
    if count == 0:
        return torch.zeros_like
    (cut,) = at_places(variance.parts, [everything[0].numel() - count], to)
    return lambda deltas: deltas * (deltas.var(0, unbiased=False) >= cut)
