"""Realization costs behind an activation: what a neuron's *outputs* on given inputs ask for, not its coefficients.

ReLU. On finitely many inputs a neuron's function only fixes its pre-activation where that is positive, and its sign
elsewhere, so neuron i takes over neuron j's function at

    C^ReLU_ij = min ‖w‖²  such that  (f_i + d_i ⊙ w)·x = w_j·x  where w_j·x > 0,  (f_i + d_i ⊙ w)·x ≤ 0  elsewhere,

a convex quadratic programme. **C^ReLU_ij ≤ C_ij for inputs in the span of U**: let w realize the function, Uᵀ(f_i + d_i
⊙ w) = Uᵀ w_j. Every input is x = U z, so (f_i + d_i ⊙ w)·x = zᵀ Uᵀ(f_i + d_i ⊙ w) = zᵀ Uᵀ w_j = w_j·x: all constraints
hold, and the least feasible norm is no larger than the least realizing one. The same w has the same outputs through
any activation η, so the ridge form min_w (1/ρ) E[(h_j(x) − η((f_i + d_i ⊙ w)·x))²] + ‖w‖² is ≤ C_ij too. If the active
inputs span U, the equalities say Uᵀ(f_i + d_i ⊙ w) = Uᵀ w_j, so C^ReLU = C. Inputs with parts outside of span U break
all of this (at τ = 0.9 real ones do), so inputs are projected first, on the mean plus span U where the support is
centred, and costs on raw inputs are a value of their own.

A centred support goes with a free bias, which costs nothing: it is eliminated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf

import numpy as np
import torch
from scipy.optimize import least_squares, nnls
from torch import Tensor

from mergeid.errors import MergeidError
from mergeid.evidence.function_class import EPSILON, FunctionClasses

FEASIBLE = 1e-9
"""Violation of a constraint, relative to the largest pre-activation, that counts as none."""
CUTS = 64
"""Violated inequalities that are added at once."""

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """One neuron to take over one function, in the coordinates of its inputs.

    Attributes:
        inputs: float64 [N, p]; map: M [p, r], weight w [r] gives the coefficients centre + M w [p].
        target: coefficients [p] of the function; offset: what is added to its pre-activations (bias, mean).
        free_bias: whether the neuron has a bias of its own.
    """

    inputs: np.ndarray
    map: np.ndarray
    centre: np.ndarray
    target: np.ndarray
    offset: float
    free_bias: bool

    @property
    def pre_activation(self) -> np.ndarray:
        """Of the function to be taken over, [N]."""
        answer: np.ndarray = self.inputs @ self.target + self.offset
        return answer


def problem(
    classes: FunctionClasses,
    weights: Tensor,
    inputs: Tensor,
    i: int,
    j: int,
    *,
    bias: Tensor | None = None,
    raw: bool = False,
) -> Problem:
    """Neuron i of the classes and the function of effective weight ``weights[j]``.

    Args:
        inputs: [N, d], or [N, groups, d] of a grouped convolution.
        bias: [m], of the functions, where the support is centred. The support is taken as it is otherwise.
        raw: leave the inputs as they are instead of projecting them.

    Raises `MergeidError` for neurons of different groups, or a bias where the support is not centred.
    """
    size = classes.m // len(classes.supports)
    group = i // size
    if j // size != group:
        raise MergeidError(f"neurons {i} and {j} lie in different groups of a convolution: their inputs differ")
    support = classes.supports[group]
    if bias is not None and not support.centred:
        raise MergeidError("a bias needs a centred support; take the support with centred=True")
    x = (inputs[:, group] if inputs.dim() == 3 else inputs).double()
    shift = support.mean if support.centred else torch.zeros_like(support.mean)
    offset = (0.0 if bias is None else float(bias[j])) + float(weights[j].double() @ shift)
    if raw:
        scaling = torch.ones_like(classes.fixed[i]) if classes.scaling is None else classes.scaling[i]
        full = torch.diag(scaling.double()) if classes.row_space is None else classes.row_space.double()
        parts = (x - shift, full, classes.fixed[i].double(), weights[j].double())
    else:
        inside = i - group * size
        centre, target = classes.centres[group][inside], support.project(weights[j : j + 1])[0]
        parts = (support.project(x - shift), classes.map_of(i), centre, target)
    values = [p.numpy() for p in parts]
    return Problem(values[0], values[1], values[2], values[3], offset, support.centred)


def relu_costs(
    classes: FunctionClasses,
    weights: Tensor,
    inputs: Tensor,
    *,
    bias: Tensor | None = None,
    pairs: Iterable[tuple[int, int]] | None = None,
    raw: bool = False,
) -> Tensor:
    """C^ReLU, float64 [m, m]: NaN where a pair was not asked for, +∞ where infeasible and across groups.

    Args:
        pairs: (i, j) to compute; default: all. raw: on the inputs as they are, where C^ReLU ≤ C need not hold.
        weights, inputs, bias: as in `problem`.
    """
    size = classes.m // len(classes.supports)
    linear = None if raw else classes.costs(weights)
    out = torch.full((classes.m, classes.m), torch.nan, dtype=torch.float64)
    everything = ((i, j) for i in range(classes.m) for j in range(classes.m))
    for i, j in everything if pairs is None else pairs:
        if i // size != j // size:
            out[i, j] = torch.inf
            continue
        found = problem(classes, weights, inputs, i, j, bias=bias, raw=raw)
        out[i, j] = relu_cost(found, at_most=inf if linear is None else float(linear[i, j]))
    return out


def relu_cost(p: Problem, *, at_most: float = inf) -> float:
    """The quadratic programme's value; +∞ where it is infeasible.

    The equalities are eliminated; what is left is a least-distance problem, min ‖u‖ with G u ≥ h, whose dual is a
    non-negative least-squares problem (Lawson and Hanson, "Solving Least Squares Problems", chapter 23), solved on the
    violated inequalities, more and more of them until none is violated.

    Args:
        at_most: the linear cost C_ij, which is an upper bound for projected inputs, and the value where the active
            inputs span the space.
    """
    pre = p.pre_activation
    active = pre > FEASIBLE * max(float(np.abs(pre).max(initial=0)), 1e-300)
    if p.free_bias and not active.any():
        return 0.0  # a low enough bias silences any neuron
    reference = int(np.flatnonzero(active)[0]) if p.free_bias else None
    origin = np.zeros(p.inputs.shape[1]) if reference is None else p.inputs[reference]
    start = 0.0 if reference is None else float(pre[reference])
    shifted = p.inputs - origin
    on, off = shifted[active], shifted[~active]
    if at_most < inf and _rank(on) == p.inputs.shape[1]:
        return at_most
    left, singular, _ = np.linalg.svd(p.map, full_matrices=False)
    live = singular > max(p.map.shape) * EPSILON * max(float(singular.max(initial=0)), EPSILON)
    reach = left[:, live] * singular[live]
    scale = max(float(np.abs(pre).max(initial=0)), float(np.abs(p.inputs @ p.centre).max(initial=0)), 1e-300)
    solution, kernel = _equalities(on @ reach, on @ (p.target - p.centre), scale)
    if solution is None:
        return at_most
    room = -start - off @ (p.centre + reach @ solution)
    u = _least_distance(-(off @ reach @ kernel), -room, scale)
    if u is None:
        return at_most
    return min(float(solution @ solution + u @ u), at_most)


def _rank(rows: np.ndarray) -> int:
    return int(np.linalg.matrix_rank(rows)) if rows.size else 0


def _equalities(a: np.ndarray, b: np.ndarray, scale: float) -> tuple[np.ndarray | None, np.ndarray]:
    """Least-norm solution of a y = b (None if there is none) and an orthonormal basis of a's kernel."""
    if not a.size:
        return np.zeros(a.shape[1]), np.eye(a.shape[1])
    if len(a) > a.shape[1] + 1:
        # fewer equations with the same solutions: the triangle of a QR decomposition of (a, b)
        triangle = np.asarray(np.linalg.qr(np.column_stack([a, b]), mode="r"))
        a, b = triangle[:, :-1], triangle[:, -1]
    _, singular, right = np.linalg.svd(a, full_matrices=True)
    rank = int((singular > max(a.shape) * EPSILON * singular.max()).sum())
    solution = right[:rank].T @ (np.linalg.pinv(a @ right[:rank].T) @ b)
    if float(np.abs(a @ solution - b).max()) > 1e-7 * scale:
        return None, right[rank:].T
    return solution, right[rank:].T


def _least_distance(g: np.ndarray, h: np.ndarray, scale: float) -> np.ndarray | None:
    """The u of least norm with g u ≥ h up to FEASIBLE · scale; None where there is none."""
    u = np.zeros(g.shape[1])
    chosen: list[int] = []
    while True:
        lack = h - g @ u
        lack[chosen] = -inf
        worst = np.argsort(-lack)[:CUTS]
        worst = worst[lack[worst] > FEASIBLE * scale]
        if not len(worst):
            return u
        chosen += worst.tolist()
        # equal norms of the rows keep the dual problem well scaled; a row of zeros cannot be helped
        norms = np.linalg.norm(g[chosen], axis=1)
        if (norms <= EPSILON * np.abs(g).max(initial=0)).any():
            return None
        system = np.vstack([(g[chosen] / norms[:, None]).T, (h[chosen] / norms)[None] / scale])
        goal = np.zeros(len(system))
        goal[-1] = 1.0
        dual, _ = nnls(system, goal, maxiter=100 * system.shape[1])
        rest = system @ dual - goal
        if -rest[-1] <= 1e-14:
            return None
        u = -scale * rest[:-1] / rest[-1]


def linear_ridge_costs(classes: FunctionClasses, weights: Tensor, rho: float) -> Tensor:
    """min_w (1/ρ) E[(w_j·x − (f_i + d_i ⊙ w)·x)²] + ‖w‖² of linear units on the support, float64 [m, m].

    = bᵀ (S_i + ρ Λ⁻¹)⁻¹ b with b = a_j − v_i and Λ the inputs' variances along U; for D = 1 and a support of all
    directions, bᵀ Σ (Σ + ρ)⁻¹ b. Finite for every class, and ≤ C_ij. +∞ across groups.

    Raises `MergeidError` unless ρ > 0."""
    if not rho > 0:
        raise MergeidError(f"the ridge must be positive, got {rho}")
    out = torch.full((classes.m, classes.m), torch.inf, dtype=torch.float64)
    size = classes.m // len(classes.supports)
    for g, (support, a, v) in enumerate(
        zip(classes.supports, classes.coefficients(weights), classes.centres, strict=True)
    ):
        # with Λ^½ on both sides no variance is divided by
        root = support.variances[: support.k].sqrt()
        a, v = a * root, v * root
        shared = None
        if classes.scaling is None:
            shared = torch.linalg.cholesky(_ridge_matrix(classes.map_of(g * size), root, rho))
        for i in range(size):
            factor = shared
            if factor is None:
                factor = torch.linalg.cholesky(_ridge_matrix(classes.map_of(g * size + i), root, rho))
            half = torch.linalg.solve_triangular(factor, (a - v[i]).T, upper=False)
            out[g * size + i, g * size : (g + 1) * size] = half.square().sum(0)
    return out


def _ridge_matrix(m: Tensor, root: Tensor, rho: float) -> Tensor:
    scaled = root[:, None] * m
    return scaled @ scaled.T + rho * torch.eye(len(root), dtype=torch.float64)


def ridge_cost(
    p: Problem, activation: Activation, rho: float, *, starts: int = 4, evaluations: int = 200, seed: int = 0
) -> float:
    """An upper estimate of min_w (1/ρ) E[(h_j(x) − η((f_i + d_i ⊙ w)·x))²] + ‖w‖² for any elementwise activation η.

    The objective is not convex, so this is the best of several descents (Levenberg-Marquardt): from the least-norm
    realization, from the solution of the linear units, from w = 0 with several biases, and from `starts` random
    weights of about the first one's norm. Never above the linear cost of a realizable function. A free bias is a
    variable without a price.

    Args:
        activation: elementwise on float64 tensors, differentiable almost everywhere.
        evaluations: most evaluations of one descent. seed: of the random weights.
    """
    if not rho > 0:
        raise MergeidError(f"the ridge must be positive, got {rho}")
    n, r = len(p.inputs), p.map.shape[1]
    values = activation(torch.from_numpy(p.pre_activation)).numpy()
    features = p.inputs @ p.map
    fixed = p.inputs @ p.centre
    weight = 1 / np.sqrt(rho * n)

    def split(z: np.ndarray) -> tuple[np.ndarray, float]:
        return z[:r], float(z[r]) if p.free_bias else p.offset

    def residual(z: np.ndarray) -> np.ndarray:
        w, bias = split(z)
        out = activation(torch.from_numpy(fixed + features @ w + bias)).numpy()
        return np.concatenate([weight * (out - values), w])

    def jacobian(z: np.ndarray) -> np.ndarray:
        w, bias = split(z)
        pre = torch.from_numpy(fixed + features @ w + bias).requires_grad_()
        (slope,) = torch.autograd.grad(activation(pre).sum(), pre)
        rows = weight * slope.numpy()[:, None] * (np.column_stack([features, np.ones(n)]) if p.free_bias else features)
        return np.vstack([rows, np.eye(r, rows.shape[1])])

    difference = p.target - p.centre
    linear = np.vstack([weight * features, np.eye(r)])
    realization = np.linalg.pinv(p.map) @ difference
    by_linear = np.linalg.lstsq(linear, np.concatenate([weight * (p.inputs @ difference), np.zeros(r)]), rcond=None)[0]
    rng = np.random.default_rng(seed)
    length = float(np.linalg.norm(realization)) / max(r, 1) ** 0.5
    reach = float(np.abs(p.pre_activation).max(initial=0))
    # a bias far down silences a neuron, one far up makes it linear or constant
    far = reach + float(np.abs(fixed).max(initial=0))
    points = [(realization, p.offset), (by_linear, p.offset), *((np.zeros(r), b) for b in (p.offset, -far, far))]
    # from near 0 to beyond the realization, a free bias anywhere in the range of pre-activations
    for size in np.geomspace(0.05, 1.5, starts).tolist():
        points.append((size * length * rng.standard_normal(r), reach * float(rng.uniform(-1, 1))))
    best = inf
    for start, shift in points:
        z = np.append(start, shift) if p.free_bias else start
        best = min(best, float(np.square(residual(z)).sum()))
        if len(z):
            found = least_squares(residual, z, jacobian, method="lm", max_nfev=evaluations)
            best = min(best, 2 * float(found.cost))
    return best
