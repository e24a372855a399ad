"""Effective function classes of a layer's neurons, and what it costs one neuron to take over another's function.

Neuron i has the effective weight f_i + d_i ⊙ w, its fixed part and its trainable one. On inputs with support basis U
its pre-activations are given by k coefficients, and those it can reach are v_i + im(M_i) with the centre v_i = Uᵀf_i
and M_i = Uᵀ Diag(d_i) (arXiv 2606.04754). The realization cost of neuron j's function by neuron i is the least squared
norm of a trainable weight that does it,

    C_ij = min { ‖w‖² : v_i + M_i w = a_j } = (a_j − v_i)ᵀ S_i⁺ (a_j − v_i),   S_i = M_i M_iᵀ,   a_j = Uᵀ w_j,

with w_j the effective weight, and +∞ where a_j − v_i leaves im(M_i). It presumes that both models' inputs of the layer
are matched already.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mergeid.errors import MergeidError
from mergeid.evidence.support import Support

VALUES = 1 << 23
"""Float64 values of intermediate results that are held at once (64 MB)."""
WELL_CONDITIONED = 1e-6
"""Eigenvalues of S_i within this factor of each other are taken as they are; else the SVD of M_i is."""
TOLERANCE = 1e-5
"""Relative residual below which a function counts as realizable: weights are stored in float32."""

EPSILON = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Factor:
    """Singular value decompositions of some neurons' M_i: left vectors and inverse singular values.

    Attributes:
        neurons: int64 [c], of the group; `shared`: all of them have the one decomposition in `left`, `inverse`.
        left: float64 [c or 1, k, k], orthogonal; inverse: float64 [c or 1, k], 0 where the singular value is.
        live: bool [c or 1, k], the directions that are in im(M_i).
    """

    neurons: Tensor
    left: Tensor
    inverse: Tensor
    live: Tensor

    @property
    def shared(self) -> bool:
        return len(self.left) == 1

    @property
    def full(self) -> bool:
        """Whether every function is realizable."""
        return bool(self.live.all())

    def part(self, at: Tensor) -> Factor:
        """Some of the neurons, by their place in `neurons`."""
        index = at.new_zeros(len(at)) if self.shared else at
        return Factor(self.neurons[at], self.left[index], self.inverse[index], self.live[index])


@dataclass(frozen=True)
class FunctionClasses:
    """The function classes of all neurons of one layer.

    Attributes:
        fixed: F [m, d].
        supports: one per group of a grouped convolution; the neurons lie in equal consecutive groups.
        scaling: D [m, d]; None: all ones.
        row_space: orthonormal Q [d, r] where all trainable weights are w = Q z (LoRA), cost ‖z‖² = ‖w‖²; not with D.
        free_scale: a BatchNorm follows, so neuron j's function may be scaled: the least cost of s·a_j over s > 0.
        tolerance: relative residual up to which a function is realizable.

    Raises `MergeidError` where shapes do not fit each other.
    """

    fixed: Tensor
    supports: tuple[Support, ...]
    scaling: Tensor | None = None
    row_space: Tensor | None = None
    free_scale: bool = False
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        m, d = self.fixed.shape
        if m % len(self.supports) or any(s.d != d for s in self.supports):
            widths = ", ".join(str(s.d) for s in self.supports)
            raise MergeidError(
                f"a fixed part of shape ({m}, {d}) does not fit {len(self.supports)} groups of supports of {widths} "
                "inputs; take both from the same layer"
            )
        if self.scaling is not None and (self.scaling.shape != self.fixed.shape or self.row_space is not None):
            raise MergeidError("the scaling D must have the shape of the fixed part F, and excludes a row space")
        if self.row_space is not None and self.row_space.shape[0] != d:
            raise MergeidError(f"the row space has {self.row_space.shape[0]} rows, expected {d}, one per input")

    @property
    def m(self) -> int:
        """Number of neurons."""
        return len(self.fixed)

    @property
    def plain(self) -> bool:
        """Whether every direction is trainable at the same price: D = 1."""
        return self.scaling is None and self.row_space is None

    @cached_property
    def centres(self) -> tuple[Tensor, ...]:
        """v_i per group: float64 [m / groups, k]."""
        return tuple(s.project(self.fixed[part]) for s, part in self._groups())

    def coefficients(self, weights: Tensor) -> tuple[Tensor, ...]:
        """a_j per group: float64 [m / groups, k], of effective weights [m, d].

        Raises `MergeidError` for weights of another shape."""
        if weights.shape != self.fixed.shape:
            raise MergeidError(
                f"effective weights of shape {tuple(weights.shape)} do not fit classes of shape "
                f"{tuple(self.fixed.shape)}"
            )
        return tuple(s.project(weights[part]) for s, part in self._groups())

    def _groups(self) -> Iterator[tuple[Support, slice]]:
        size = self.m // len(self.supports)
        for g, support in enumerate(self.supports):
            yield support, slice(g * size, (g + 1) * size)

    def map_of(self, neuron: int) -> Tensor:
        """M_i: float64 [k, d], or [k, r] for a row space."""
        support = self.supports[neuron * len(self.supports) // self.m]
        if self.row_space is not None:
            return support.U.T @ self.row_space.double()
        return support.U.T if self.scaling is None else support.U.T * self.scaling[neuron].double()

    def factors(self, group: int) -> Iterator[Factor]:
        """Decompositions of the M_i of one group, neurons with equal masks together, others in chunks."""
        support, part = list(self._groups())[group]
        size, k = part.stop - part.start, support.k
        everyone = torch.arange(size)
        if self.plain:
            one = torch.ones(1, k, dtype=torch.float64)
            yield Factor(everyone, torch.eye(k, dtype=torch.float64)[None], one, one.bool())
            return
        if self.row_space is not None:
            yield Factor(everyone, *_decompose(support.U.T[None] @ self.row_space.double()))
            return
        assert self.scaling is not None
        masks, inverse, counts = np.unique(
            self.scaling[part].double().numpy(), axis=0, return_inverse=True, return_counts=True
        )
        inverse = inverse.reshape(-1)
        for at in np.flatnonzero(counts > 1):
            neurons = torch.from_numpy(np.flatnonzero(inverse == at))
            yield Factor(neurons, *_decompose(support.U.T[None] * torch.from_numpy(masks[at])))
        single = torch.from_numpy(np.flatnonzero(counts[inverse] == 1))
        for neurons in single.split(max(VALUES // max(k * support.d, 1), 1)):
            mask = torch.from_numpy(masks[inverse[neurons.numpy()]])
            yield Factor(neurons, *_decompose(support.U.T * mask[:, None, :]))

    def costs(self, weights: Tensor) -> Tensor:
        """C: float64 [m, m], C_ij for neuron i's class and neuron j's effective weight [m, d] in `weights`.

        +∞ across groups, and where the function is not realizable."""
        out = torch.full((self.m, self.m), torch.inf, dtype=torch.float64)
        for (_, part), (neurons, cost, residual) in self._blocks(weights):
            if residual is not None:
                cost = cost.masked_fill(residual > self.tolerance, torch.inf)
            out[part.start + neurons, part] = cost
        return out

    def residuals(self, weights: Tensor) -> Tensor:
        """float64 [m, m]: ‖part of a_j − v_i outside im(M_i)‖ / (‖a_j‖ + ‖v_i‖); +∞ across groups."""
        out = torch.full((self.m, self.m), torch.inf, dtype=torch.float64)
        for (_, part), (neurons, cost, residual) in self._blocks(weights):
            out[part.start + neurons, part] = torch.zeros_like(cost) if residual is None else residual
        return out

    def _blocks(self, weights: Tensor) -> Iterator[tuple[tuple[Support, slice], tuple[Tensor, Tensor, Tensor | None]]]:
        """Per group and some of its neurons: (neurons [c], costs [c, group], residuals or None where all are 0)."""
        coefficients = self.coefficients(weights)
        for g, group in enumerate(self._groups()):
            a, v = coefficients[g], self.centres[g]
            for factor in self.factors(g):
                together = factor.shared and (factor.full or not self.free_scale)
                values = len(a) if together else len(a) * max(a.shape[1], 1)
                for at in torch.arange(len(factor.neurons)).split(max(VALUES // values, 1)):
                    rows = factor.neurons[at]
                    if together:
                        yield group, (rows, *self._shared(factor, v[rows], a, rows))
                    else:
                        yield group, (rows, *self._own(factor.part(at), v[rows], a))

    def _shared(self, factor: Factor, v: Tensor, a: Tensor, neurons: Tensor) -> tuple[Tensor, Tensor | None]:
        """Neurons with one M: pairwise distances after one change of basis, a [n, k] against v [c, k]."""
        left, inverse = factor.left[0], factor.inverse[0]
        inside = self._distances((a @ left) * inverse, (v @ left) * inverse, neurons)
        if factor.full:
            return inside, None
        outside = left[:, ~factor.live[0]]
        return inside, _squared_distances(a @ outside, v @ outside).sqrt() / _norms(a, v)

    def _distances(self, a: Tensor, v: Tensor, neurons: Tensor) -> Tensor:
        if self.free_scale:
            return _least_over_scale(a.square().sum(1)[None], v @ a.T, v.square().sum(1)[:, None])
        out = _squared_distances(a, v)
        # a neuron's own cost is small beside the others': no cancellation there
        out[torch.arange(len(v)), neurons] = (a[neurons] - v).square().sum(1)
        return out

    def _own(self, factor: Factor, v: Tensor, a: Tensor) -> tuple[Tensor, Tensor | None]:
        """Neurons with an M_i each: v [c, k], a [n, k]."""
        turned_v = torch.einsum("ck,ckr->cr", v, factor.left)
        turned_a = torch.einsum("nk,ckr->cnr", a, factor.left)
        dead = (~factor.live).double()
        scale = a.new_ones(len(v), len(a))
        residual = None
        if self.free_scale:
            inner_a, inner_v = turned_a * factor.inverse[:, None], turned_v * factor.inverse
            alpha, beta = inner_a.square().sum(2), torch.einsum("cnr,cr->cn", inner_a, inner_v)
            scale = torch.where(alpha > 0, beta / alpha.clamp(min=1e-300), torch.zeros_like(beta)).clamp(min=0)
            if not factor.full:
                forced, outside = _fixed_scale(
                    turned_a * dead[:, None],
                    (turned_v * dead)[:, None],
                    a.norm(dim=1)[None],
                    v.norm(dim=1)[:, None],
                )
                scale, residual = torch.where(torch.isnan(forced), scale, forced), outside / _norms(a, v)
        difference = scale[..., None] * turned_a - turned_v[:, None]
        if residual is None and not factor.full:
            residual = (difference * dead[:, None]).norm(dim=2) / _norms(a, v)
        return (difference * factor.inverse[:, None]).square().sum(2), residual

    def least_norm(self, neuron: int, coefficients: Tensor) -> Tensor:
        """The trainable weight of least norm (float64 [d]) that gives `neuron` these coefficients [k], as well as it
        can; its squared norm is the realization cost."""
        size = self.m // len(self.supports)
        group, inside = divmod(neuron, size)
        m = self.map_of(neuron)
        left, inverse, _ = (x[0] for x in _decompose(m[None]))
        # M⁺ = Mᵀ (M Mᵀ)⁺
        z = m.T @ (left @ (inverse.square() * (left.T @ (coefficients.double() - self.centres[group][inside]))))
        return z if self.row_space is None else self.row_space.double() @ z

    def spectrum(self) -> Tensor:
        """Least and largest eigenvalue of every S_i, float64 [m, 2]: 0 and 0 where the support is empty."""
        out = torch.zeros(self.m, 2, dtype=torch.float64)
        for g, (support, part) in enumerate(self._groups()):
            if support.k == 0:
                continue
            for factor in self.factors(g):
                squares = torch.where(factor.live, 1 / factor.inverse.clamp(min=1e-300).square(), 0.0)
                out[part.start + factor.neurons] = torch.stack([squares.amin(1), squares.amax(1)], 1)
        return out

    def cost_bounds(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds on C by the anisotropy of the classes alone: ‖a_j − v_i‖² / λ_max(S_i) ≤ C_ij ≤ ‖a_j − v_i‖² / λ_min,
        float64 [m, m] each; the upper one +∞ where S_i is singular and a_j ≠ v_i."""
        lower = torch.full((self.m, self.m), torch.inf, dtype=torch.float64)
        upper = lower.clone()
        spectrum = self.spectrum()
        for (_, part), a, v in zip(self._groups(), self.coefficients(weights), self.centres, strict=True):
            distance = _squared_distances(a, v)
            least, most = spectrum[part, :1], spectrum[part, 1:]
            near = torch.where(distance > 0, torch.inf, 0.0)
            lower[part, part] = torch.where(most > 0, distance / most.clamp(min=1e-300), near)
            upper[part, part] = torch.where(least > 0, distance / least.clamp(min=1e-300), near)
        return lower, upper


def _decompose(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Left singular vectors [c, k, k], inverse singular values [c, k] and which are not 0, of maps [c, k, d]."""
    count, k, d = maps.shape
    if k == 0:
        return maps.new_zeros(count, 0, 0), maps.new_zeros(count, 0), torch.zeros(count, 0, dtype=torch.bool)
    values, left = torch.linalg.eigh(maps @ maps.transpose(1, 2))
    inverse = torch.where(values > 0, values.clamp(min=1e-300).rsqrt(), 0.0)
    live = torch.ones_like(values, dtype=torch.bool)
    # squaring halves the digits, so that a rank cannot be told from S: take M itself
    poor = torch.nonzero(values[:, 0] <= WELL_CONDITIONED * values[:, -1]).reshape(-1)
    for i in poor.tolist():
        left[i], singular, _ = torch.linalg.svd(maps[i], full_matrices=d < k)
        scale = max(float(maps[i].abs().max()), float(singular.max()))
        full = torch.zeros(k, dtype=torch.float64)
        full[: len(singular)] = singular
        live[i] = full > max(k, d) * EPSILON * max(scale, EPSILON)
        inverse[i] = torch.where(live[i], 1 / full.clamp(min=1e-300), 0.0)
    return left, inverse, live


def _norms(a: Tensor, v: Tensor) -> Tensor:
    """‖a_j‖ + ‖v_i‖: [c, n]."""
    answer: Tensor = (a.norm(dim=1)[None] + v.norm(dim=1)[:, None]).clamp(min=EPSILON)
    return answer


def _squared_distances(a: Tensor, v: Tensor) -> Tensor:
    """‖a_j − v_i‖² for a [n, k], v [c, k]: [c, n]."""
    out = (v @ a.T).mul_(-2)
    return out.add_(a.square().sum(1)[None]).add_(v.square().sum(1)[:, None]).clamp_(min=0)


def _least_over_scale(alpha: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
    """min over s > 0 of s²α − 2sβ + γ (the infimum, at s → 0, where β ≤ 0)."""
    gain = torch.where(alpha > 0, beta.clamp(min=0).square() / alpha.clamp(min=1e-300), torch.zeros_like(beta))
    return (gamma - gain).clamp(min=0)


def _fixed_scale(a: Tensor, v: Tensor, norm_a: Tensor, norm_v: Tensor) -> tuple[Tensor, Tensor]:
    """The scale that the directions outside im(M) force on a (NaN where they force none), and the residual left.

    a, v: the parts outside, broadcast to [c, n, k]. Parts below rounding count as 0."""
    square = a.square().sum(-1)
    inner = (a * v).sum(-1)
    forces = (square.sqrt() > TOLERANCE * norm_a).expand(inner.shape)
    scale = torch.where(forces, (inner / square.clamp(min=1e-300)).clamp(min=0), torch.nan)
    outside = (torch.nan_to_num(scale, nan=0.0)[..., None] * a - v).norm(dim=-1)
    return scale, outside.expand(inner.shape)
