"""Soft group elements: one doubly stochastic matrix per space, applied to all axes at once and differentiable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergeid.neuron_graph.group import block_ranks
from mergeid.neuron_graph.neuron_graph import Element, NeuronGraph, Space

Soft = Mapping[str, Tensor]
"""Space id -> [size, size]: share of member j that goes to place i; a permutation matrix is a group element."""


def hard(element: Element, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A group element as permutation matrices."""
    return {k: torch.eye(len(p), dtype=dtype)[torch.from_numpy(p)] for k, p in element.items()}


def apply_soft(graph: NeuronGraph, soft: Soft, tensor: str, value: Tensor) -> Tensor:
    """One tensor under a soft element; for permutation matrices the same as `NeuronGraph.apply`."""
    for space, axis in graph.on_tensor.get(tensor, []):
        members = torch.from_numpy(axis.members)
        where = torch.from_numpy(axis.positions).to(value.device)
        matrix = soft[space.id].to(value)
        if len(members) < space.size:
            matrix = matrix[members][:, members]
        front = value.movedim(axis.axis, 0)
        moved = matrix @ front[where].reshape(len(members), -1)
        new = front.index_copy(0, where.reshape(-1), moved.reshape(-1, *front.shape[1:]))
        value = new.movedim(0, axis.axis)
    return value


def log_sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Logarithm of the doubly stochastic matrix ``diag(u) exp(logits) diag(v)`` (Sinkhorn and Knopp 1967); the last
    two dimensions are the matrix. Sums of the columns are 1 exactly, of the rows in the limit; without a gradient
    the iterations end once these are within 1e-6."""
    for i in range(iterations):
        rows = logits.logsumexp(-1, keepdim=True)
        if i and not logits.requires_grad and bool((rows.abs() < 1e-6).all()):
            break
        logits = logits - rows
        logits = logits - logits.logsumexp(-2, keepdim=True)
    return logits


class _Sinkhorn(torch.autograd.Function):
    """`log_sinkhorn(...).exp()`, differentiated implicitly (Eisenberger et al. 2022; Peña et al. 2023).

    With G the gradient at P, that at the logits is P ∘ (G - α 1ᵀ - 1 βᵀ) where its rows and columns sum to 0: both
    conditions are met in turn, which is the adjoint of the iterations at their limit. The memory is that of P, whatever
    their number."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, iterations: int) -> Tensor:
        p = log_sinkhorn(logits.detach(), iterations).exp()
        ctx.save_for_backward(p)
        ctx.iterations = iterations
        return p

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (p,), (g,) = ctx.saved_tensors, gradients
        pg = p * g
        rows, columns = pg.sum(-1, keepdim=True), pg.sum(-2, keepdim=True).mT
        mass, beta = p.sum(-1, keepdim=True).clamp(min=1e-12), torch.zeros_like(columns)
        alpha = rows
        for _ in range(ctx.iterations):
            alpha = (rows - p @ beta) / mass
            beta = columns - p.mT @ alpha
        return pg - p * (alpha + beta.mT), None


def doubly_stochastic(logits: Tensor, iterations: int) -> Tensor:
    """The doubly stochastic matrix ``diag(u) exp(logits) diag(v)``; the last two dimensions are the matrix."""
    if logits.requires_grad:
        return _Sinkhorn.apply(logits, iterations)  # type: ignore[no-any-return]
    return log_sinkhorn(logits, iterations).exp()


def soft_element(
    graph: NeuronGraph, logits: Mapping[str, Tensor], iterations: int, before: Soft | None = None, changed: str = ""
) -> dict[str, Tensor]:
    """A soft element of the nested group: inside each pair of blocks a doubly stochastic matrix, weighted by how much
    of the one block the parents send to the other.

    Args:
        logits: space id -> [size, size] logarithms of shares, up to a constant per row and column.
        before, changed: the soft element of logits that differed in this one space; what does not lie in it is kept.
    """
    soft: dict[str, Tensor] = {}
    new = {changed}
    for s in graph.spaces:
        if before is not None and not new & {s.id, *s.parents}:
            soft[s.id] = before[s.id]
            continue
        new.add(s.id)
        n, m = s.blocks, s.members
        inner = doubly_stochastic(logits[s.id].reshape(n, m, n, m).transpose(1, 2), iterations)
        soft[s.id] = (inner * _between(s, soft)[:, :, None, None]).transpose(1, 2).reshape(s.size, s.size)
    return soft


def _between(space: Space, soft: Soft) -> Tensor:
    """[blocks, blocks]: how much of block c goes to block b; blocks in the same parents go in order."""
    if not space.parents:
        return torch.eye(space.blocks)
    rank = block_ranks(space.block_parents)
    weight = torch.from_numpy(rank[:, None] == rank[None, :]).float()
    for k, parent in enumerate(space.parents):
        place = torch.from_numpy(space.block_parents[:, k])
        weight = weight * soft[parent][place][:, place]
    return weight


def scaled(graph: NeuronGraph, states: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The tensors of the graph in float32, each divided by its root mean square over all models."""
    out: list[dict[str, Tensor]] = [{} for _ in states]
    for name in graph.on_tensor:
        values = [state[name].detach().float().cpu() for state in states]
        square = sum(float(v.square().mean(dtype=torch.float64)) for v in values) / len(values)
        for found, v in zip(out, values, strict=True):
            found[name] = v / square**0.5 if square > 0 else v
    return out
