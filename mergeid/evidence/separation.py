"""How far apart the structure holds a layer's neurons, and its inputs."""

from __future__ import annotations

from math import inf, log, sqrt

import torch
from torch import Tensor

from mergeid.evidence.function_class import FunctionClasses

PAIRS = 1 << 22
"""Pairs whose distances are held at once."""
ALIKE = 1e-9
"""Relative distance of two inputs' rows of U below which they are duplicates."""


def gamma_out(classes: FunctionClasses) -> float:
    """γ_out = √2 · min_{i≠j} ‖v_j − v_i‖: what a swap of two neurons moves the centres by, at least.

    For a random F of standard deviation σ it is of order σ √k m^(−2/k). Neurons of different groups are never swapped.
    +∞ for a single neuron."""
    found = [float(_nearest(v)[0]) for v in classes.centres if len(v) > 1]
    return 2**0.5 * min(found, default=inf)


def gamma_in(classes: FunctionClasses) -> float:
    """γ_in = min_{a≠b} ‖F_a − F_b‖ ‖U_a − U_b‖, F_a the column of input a: what a swap of two inputs moves all centres
    by, at least; about σ √(2m) min ‖U_b − U_a‖ for a random F.

    Inputs off the support (U_a = 0) are left out, and so is one of two with the same values: to swap those changes
    nothing. +∞ where fewer than two are left."""
    size = classes.m // len(classes.supports)
    found = inf
    for g, support in enumerate(classes.supports):
        if support.tokens is not None:
            # unit vectors: every two of them are √2 apart
            columns = classes.fixed[g * size : (g + 1) * size].double().T[support.tokens[: support.k]]
            found = min(found, 2**0.5 * float(_nearest(columns)[0]) if support.k > 1 else inf)
            continue
        rows = support.U
        norms = rows.norm(dim=1)
        live = torch.nonzero(norms > ALIKE * norms.max()).reshape(-1) if support.k else torch.zeros(0).long()
        u, f = rows[live], classes.fixed[g * size : (g + 1) * size].double().T[live]
        if len(live) > 1 and not bool(f.any()):
            return 0.0
        for part in torch.arange(len(live)).split(max(PAIRS // max(len(live), 1), 1)):
            if len(live) > 1:
                found = min(found, _least_product(u, f, part))
    return found


def _least_product(u: Tensor, f: Tensor, part: Tensor) -> float:
    """min over a in `part`, b > a of ‖u_a − u_b‖ ‖f_a − f_b‖ without duplicates (of u): by the Gram matrices, then
    exactly for the pairs that these cannot tell from the least one."""
    close, product = [], []
    for x in (u, f):
        squares = x.square().sum(1)
        scale = squares[part, None] + squares[None]
        distance = (scale - 2 * x[part] @ x.T).clamp(min=0)
        close.append(distance <= 1e-6 * scale)
        product.append(distance)
    later = torch.arange(len(u))[None] > part[:, None]
    approximate = torch.where(later & ~close[0] & ~close[1], product[0] * product[1], torch.inf)
    near = later & ((approximate <= 1.01 * approximate.min()) | close[0] | close[1])
    found = inf
    for pairs in torch.nonzero(near).split(max(PAIRS // (u.shape[1] + f.shape[1]), 1)):
        if not len(pairs):
            break
        a, b = part[pairs[:, 0]], pairs[:, 1]
        inputs = (u[a] - u[b]).norm(dim=1)
        exact = torch.where(inputs > ALIKE * (u[a].norm(dim=1) + u[b].norm(dim=1)), inputs, torch.inf)
        values = exact * (f[a] - f[b]).norm(dim=1)
        found = min(found, float(torch.where(torch.isnan(values), torch.inf, values).min()))
    return found


def anisotropy(classes: FunctionClasses, mean: float = 1.0) -> Tensor:
    """‖S_i − p I‖ (spectral norm) of every neuron, float64 [m]: how unevenly its trainable part sees the support.

    Args:
        mean: p, the expected square of an entry of D (the trainable share of a random mask)."""
    spectrum = classes.spectrum()
    return (spectrum - mean).abs().amax(1)


def anisotropy_bound(coherence: float, k: int, *, deviation: float, spread: float, violation: float) -> float:
    """What ‖S_i − p I‖ exceeds with probability `violation` at most, for a random D: with L = log(2k/violation),

        ⅔ b ν L + σ √(2 ν L)

    by the matrix Bernstein inequality (Tropp 2012; used so in arXiv 2606.04754): incoherent supports are seen evenly.

    Args:
        coherence: ν(U). deviation: b = sup |d² − p|. spread: σ, standard deviation of d². A 0/1 mask of trainable
            share p has b = max(p, 1 − p), σ = √(p(1 − p)).
    """
    if k == 0:
        return 0.0
    scale = log(2 * k / violation)
    return 2 / 3 * deviation * coherence * scale + spread * sqrt(2 * coherence * scale)


def _nearest(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least distance of two rows, and which: found by the Gram matrix, then taken exactly for every row's nearest."""
    partner = torch.empty(len(v), dtype=torch.int64)
    squares = v.square().sum(1)
    for rows in torch.arange(len(v)).split(max(PAIRS // len(v), 1)):
        block = squares[None] - 2 * v[rows] @ v.T
        block[torch.arange(len(rows)), rows] = torch.inf
        partner[rows] = block.argmin(1)
    distance = (v - v[partner]).norm(dim=1)
    at = distance.argmin()
    return distance[at], at, partner[at]
