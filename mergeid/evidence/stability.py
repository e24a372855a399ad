"""How far the input distribution may shift before a decision about a layer can change.

The covariance Σ of the layer's inputs moves by E, ‖E‖ ≤ ε (spectral norm), and k stays. With the eigengap g = λ_k −
λ_{k+1} of the unshifted Σ the support's projection P moves by at most

    ‖P − P'‖ ≤ η(ε) = sin(½ arcsin(2ε/g))   for ε < g/2   (the sin 2Θ theorem of Davis and Kahan, 1970).

D = 1. A swap cost is T_ij = 2⟨P(w_i − w_j), f_i − f_j⟩, so |T_ij − T'_ij| ≤ 2η ‖w_i − w_j‖ ‖f_i − f_j‖. The norms
of the w cancel in Δ_π = −2 Σ_i ⟨P(w_π(i) − w_i), f_i − f̄⟩, whatever f̄ is, so that Δ_π moves by at most
2η Σ_i ‖w_π(i) − w_i‖ ‖f_i − f̄‖, which makes "the identity stays optimal" an assignment problem.

General D with |d| ≤ 1 (else D is scaled). C_ij = (w_j − f_i)ᵀ K_i (w_j − f_i) with K_i = P + R_i, where I + R_i is the
inverse of I − P(I − D_i²)P. With σ_i = λ_min(S_i) and q_i = max |1 − d_i²|, R_i moves by at most
r_i = 2q_iη / (σ_i(σ_i − 2q_iη)) while σ_i > 2q_iη. That adds ‖w_i − w_j‖ Σ_{l∈{i,j}} r_l ‖w_i + w_j − 2f_l‖ to the
bound on T_ij, and Σ_i r_i ‖w_π(i) − w_i‖ ‖w_π(i) + w_i − 2f_i‖ to that on Δ_π. A singular S_i has no certificate. A
LoRA's row space Q has QQᵀ in place of D².

Ridge. With a power-law spectrum the gap is smaller than the sampling error. On the full covariance K = Σ(Σ + ρ)⁻¹ takes
the place of P, and ‖K − K'‖ ≤ ε/ρ without any gap (D = 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import asin, inf, sin, sqrt

import torch
from torch import Tensor

from mergeid.errors import MergeidError
from mergeid.evidence.activation_cost import linear_ridge_costs
from mergeid.evidence.function_class import EPSILON, FunctionClasses
from mergeid.evidence.margin import best_permutation, margin, sensitivity, swap_costs

STEPS = 40
"""Halvings of an interval in which a largest shift is sought."""


@dataclass(frozen=True)
class Stability:
    """Shift radii of one layer: spectral norms of a change of Σ below which nothing changes. 0: no certificate.

    Attributes:
        pairs: no swap of two neurons becomes as good as the identity; permutations: no permutation does.
        ridge_pairs, ridge_permutations: the same for the costs with ridge ρ, gap-free; None unless D = 1.
        gap: g; norm: ‖Σ‖; ridge: ρ. Over the groups of a convolution the least of each counts.
    """

    pairs: float
    permutations: float
    ridge_pairs: float | None
    ridge_permutations: float | None
    gap: float
    norm: float
    ridge: float

    @property
    def by_gap(self) -> float:
        """ε*/g for all permutations; 0 without a gap."""
        return self.permutations / self.gap if self.gap > 0 else 0.0

    @property
    def radius(self) -> float:
        """ε* for all permutations, the better of both forms."""
        return max(self.permutations, self.ridge_permutations or 0.0)

    @property
    def by_norm(self) -> float:
        """ε*/‖Σ‖ for all permutations, the better of both forms."""
        return self.radius / self.norm if self.norm > 0 else 0.0


def projection_shift(epsilon: float, gap: float) -> float:
    """The largest ‖P − P'‖ that a change of norm `epsilon` can make; 1 from half the gap on."""
    return sin(asin(2 * epsilon / gap) / 2) if 2 * epsilon < gap else 1.0


def radius(shift: float, gap: float) -> float:
    """The largest ε for which every ‖E‖ < ε keeps ‖P − P'‖ below `shift`: g·η·√(1 − η²), g/2 at most."""
    if shift <= 0:
        return 0.0
    return gap / 2 if shift >= sqrt(0.5) else gap * shift * sqrt(1 - shift * shift)


def stability(classes: FunctionClasses, weights: Tensor, *, ridge: float | None = None) -> Stability:
    """The certificates of one model's effective weights [m, d] in their classes.

    Args:
        ridge: ρ; default: the least variance inside of the support. A sketch's error bound is taken off every radius.

    Memory: some m × m matrices of float64. Raises `MergeidError` where a neuron is not realizable by itself, and where
    a BatchNorm frees the scale: no bound is known for that.
    """
    if classes.free_scale:
        raise MergeidError("no shift radius is known where a BatchNorm frees the scale; take the costs without it")
    found: list[Stability] = []
    size = classes.m // len(classes.supports)
    for g, support in enumerate(classes.supports):
        part = slice(g * size, (g + 1) * size)
        own = FunctionClasses(
            classes.fixed[part],
            (support,),
            None if classes.scaling is None else classes.scaling[part],
            classes.row_space,
            tolerance=classes.tolerance,
        )
        found.append(_of_group(own, weights[part], ridge))
    return Stability(
        min(s.pairs for s in found),
        min(s.permutations for s in found),
        min(s.ridge_pairs or 0.0 for s in found) if found[0].ridge_pairs is not None else None,
        min(s.ridge_permutations or 0.0 for s in found) if found[0].ridge_permutations is not None else None,
        min(s.gap for s in found),
        min(s.norm for s in found),
        min(s.ridge for s in found),
    )


def _of_group(classes: FunctionClasses, weights: Tensor, ridge: float | None) -> Stability:
    support = classes.supports[0]
    norm = float(support.variances[0]) if support.k else 0.0
    if support.k == 0:
        return Stability(0.0, 0.0, 0.0 if classes.plain else None, 0.0 if classes.plain else None, 0.0, 0.0, 0.0)
    rho = float(support.variances[support.k - 1]) if ridge is None else ridge
    gap = support.eigengap
    cost = classes.costs(weights)
    pairs, permutations = shifts(classes, weights, cost)
    certified = [max(radius(s, gap) - support.error, 0.0) for s in (pairs, permutations)]
    by_ridge: list[float | None] = [None, None]
    if classes.plain:
        whole = replace(classes, supports=(support.with_k(len(support.variances)),))
        smooth = shifts(classes, weights, linear_ridge_costs(whole, weights, rho))
        by_ridge = [max(rho * s - support.error, 0.0) for s in smooth]
    return Stability(certified[0], certified[1], by_ridge[0], by_ridge[1], gap, norm, rho)


def shifts(classes: FunctionClasses, weights: Tensor, cost: Tensor) -> tuple[float, float]:
    """Largest ‖P − P'‖ that keeps every swap, and every permutation, dearer than the identity; 0 where one is not.

    Args:
        cost: realization costs of one group, C or, for D = 1, those with a ridge (then ‖K − K'‖ is meant).
    """
    fixed, weights = classes.fixed.double(), weights.double()
    if len(fixed) == 1:
        return inf, inf
    between = _distances(weights, weights)
    if classes.plain:
        moved = 2 * between * _distances(fixed, fixed)
        return _least_ratio(swap_costs(cost), moved), _all_permutations(
            cost, 2 * between * (fixed - fixed.mean(0)).norm(dim=1)[:, None]
        )
    scale, loss = _general(classes)
    if scale == 0 or bool(torch.isnan(loss(0.0)).any()):
        return 0.0, 0.0
    # with D = scale · D' all costs are those of D' over scale²
    cost = cost * scale**2
    swap = swap_costs(cost)
    off = ~torch.eye(len(cost), dtype=torch.bool)
    common, own = 2 * between * _distances(fixed, fixed), between * _sums(weights, fixed)
    middle = 2 * between * (fixed - fixed.mean(0)).norm(dim=1)[:, None]

    def keeps_pairs(eta: float) -> bool:
        r = loss(eta)
        if bool(torch.isnan(r).any()):
            return False
        each = r[:, None] * own
        return bool((swap - eta * common - each - each.T)[off].min() > 0)

    def keeps_all(eta: float) -> bool:
        r = loss(eta)
        return not bool(torch.isnan(r).any()) and margin(cost - eta * middle - r[:, None] * own).identifiable

    pairs = _largest(keeps_pairs, 1.0)
    return pairs, _largest(keeps_all, pairs)


def _general(classes: FunctionClasses) -> tuple[float, Callable[[float], Tensor]]:
    """The largest |d|, and r_i [m] as a function of η, NaN where there is no bound, for D over that."""
    spectrum = classes.spectrum()[:, 0]
    if classes.scaling is None:
        scale = 1.0
        q = torch.ones(classes.m, dtype=torch.float64)
    else:
        scale = float(classes.scaling.abs().max())
        q = (1 - (classes.scaling.double() / max(scale, EPSILON)).square()).abs().amax(1)
    least = spectrum / max(scale, EPSILON) ** 2

    def loss(eta: float) -> Tensor:
        room = least - 2 * q * eta
        return torch.where((room > 0) & (least > 0), 2 * q * eta / (least * room), torch.nan)

    return scale, loss


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(
        a, b, compute_mode="donot_use_mm_for_euclid_dist" if len(a) <= 1024 else "use_mm_for_euclid_dist"
    )


def _sums(weights: Tensor, fixed: Tensor) -> Tensor:
    """‖w_i + w_j − 2f_i‖ at [i, j]."""
    return _distances(2 * fixed - weights, weights)


def _least_ratio(swap: Tensor, moved: Tensor) -> float:
    off = ~torch.eye(len(swap), dtype=torch.bool)
    values = swap[off] / moved[off].clamp(min=1e-300)
    # equal neurons: neither their swap cost nor its change is anything but 0
    return max(float(values.min()), 0.0)


def _all_permutations(cost: Tensor, moved: Tensor) -> float:
    """min over π ≠ id of Δ_π / Σ_i moved[i, π(i)]: the largest η that keeps the identity optimal for cost − η·moved.

    Dinkelbach's method: the best permutation at η gives the next, smaller η, until it is the identity."""
    moved = moved.clone()
    moved.fill_diagonal_(0)
    start = margin(cost)
    if not start.identifiable:
        return 0.0
    if start.value == inf:
        return inf
    n = len(cost)
    eta = _least_ratio(swap_costs(cost), moved + moved.T)
    rows = torch.arange(n)
    rounding = 1e-12 * float(cost[torch.isfinite(cost)].abs().max())
    while True:
        permutation = best_permutation(cost - eta * moved)
        to = torch.from_numpy(permutation)
        delta, length = sensitivity(cost, permutation), float(moved[rows, to].sum())
        if length == 0 or delta - eta * length >= -rounding:
            return eta
        eta = max(delta / length, 0.0)


def _largest(keeps: Callable[[float], bool], most: float) -> float:
    """The largest η in [0, most] that keeps, from below; `keeps` is monotone."""
    if most <= 0 or not keeps(0.0):
        return 0.0
    if keeps(most):
        return most
    low, high = 0.0, most
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low
