"""Neurons that the next layer reads only together: what looking at them one by one cannot tell.

Realization costs are sums over neurons. Two neurons may each be certain to keep their place and still carry one
feature only jointly: if the next layer reads r·(h_1 − h_2), whatever is added to both is never seen, and two networks
of the same function may differ in every neuron, without any permutation between them. The kernel of the readout says
how far that goes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Interactions:
    """Attributes:
    rank: dimensions in which the next layer sees the neurons; hidden: combinations that it does not see, m − rank.
    freedom: float64 [m], in [0, 1]: share of neuron i that is not seen, Σ of squares of its entries in the kernel's
        orthonormal basis. 0: the neuron's own function is read off; 1: it is not read at all.
    together: pairs of neurons with the same readout up to a factor, and its sign.
    """

    rank: int
    hidden: int
    freedom: Tensor
    together: list[tuple[int, int, int]]


def interactions(readout: Tensor, *, tolerance: float = 1e-6) -> Interactions:
    """How the next layer's weights [outputs, m] read m neurons.

    Args:
        tolerance: singular values, relative to the largest, and 1 − |cosine| up to which readouts count as alike.
    """
    r = readout.double()
    _, singular, right = torch.linalg.svd(r, full_matrices=False)
    live = singular > tolerance * singular.max() if len(singular) and singular.max() > 0 else singular > 0
    rank = int(live.sum())
    freedom = (1 - right[live].square().sum(0)).clamp(0, 1)
    norms = r.norm(dim=0)
    unit = r / norms.clamp(min=1e-300)
    together = []
    for i in torch.nonzero(norms > tolerance * norms.max()).reshape(-1).tolist() if rank else []:
        cosine = unit[:, i] @ unit[:, i + 1 :]
        for j in torch.nonzero(1 - cosine.abs() <= tolerance).reshape(-1).tolist():
            together.append((i, i + 1 + j, 1 if cosine[j] > 0 else -1))
    return Interactions(rank, r.shape[1] - rank, freedom, together)
