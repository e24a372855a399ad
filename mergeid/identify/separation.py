"""How far apart the structure holds a layer's neurons, and its inputs."""

from __future__ import annotations

from math import inf, log, sqrt

import torch
from torch import Tensor

from mergeid.identify.function_class import FunctionClasses

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
        rows = support.U
        norms = rows.norm(dim=1)
        live = torch.nonzero(norms > ALIKE * norms.max()).reshape(-1) if support.k else torch.zeros(0).long()
        columns = classes.fixed[g * size : (g + 1) * size].double().T
        for part in live.split(max(PAIRS // max(len(live), 1), 1)):
            inputs = torch.cdist(rows[part], rows[live], compute_mode="donot_use_mm_for_euclid_dist")
            fixed = torch.cdist(columns[part], columns[live], compute_mode="donot_use_mm_for_euclid_dist")
            scale = norms[part, None] + norms[None, live]
            product = torch.where(inputs > ALIKE * scale, inputs * fixed, torch.inf)
            found = min(found, float(product.min()))
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
